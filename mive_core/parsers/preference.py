"""The commands of blind comparisons."""

from pathlib import Path

from ..commands.preference import run_preference_make, run_preference_report
from .parser import add_command, add_group, integer, positive_float, positive_int, text


def add_preference(commands) -> None:
    preference = add_group(commands, "preference", "let people compare edits blindly", "steps")
    make = add_command(
        preference,
        "make",
        run_preference_make,
        "make a web page that shows edits of the same clips side by side and collects votes",
        "The page is one file, which holds the videos and works without a server. Its key, FILE.key.json, says which video is whose: raters do not get it.",
    )
    make.add_argument(
        "systems",
        nargs="+",
        type=system,
        metavar="[NAME=]DIR",
        help="what to compare: two folders or more that `mive edit --manifest` or `mive eval` wrote, or with a video NAME.mp4 for each clip; "
        "the name is that of the folder unless given",
    )
    make.add_argument("--manifest", required=True, type=text, metavar="PAIRS.jsonl|DIR", help="manifest or folder of the pairs that were edited")
    make.add_argument("--output", required=True, type=text, metavar="FILE.html", help="page to write")
    make.add_argument("--scores", action="store_true", help="also ask for a score of 1 to 5 for each video")
    make.add_argument("--height", type=positive_int, default=480, metavar="N", help="scale taller videos down to N pixels; default 480")
    make.add_argument("--crf", type=integer, default=16, metavar="N", help="quality of the videos in the page, smaller: better; default 16")
    make.add_argument("--max-size", type=positive_float, default=300.0, metavar="MB", help="largest page to write, in megabytes; default 300")
    report = add_command(preference, "report", run_preference_report, "say what the votes show", "Prints tables of win rates, tests, scores and agreement.")
    report.add_argument("votes", nargs="+", type=text, metavar="VOTES.json", help="file of each rater, as the page downloads it")
    report.add_argument("--key", required=True, type=text, metavar="FILE.key.json", help="key that was written beside the page")
    report.add_argument("--json", "--output", dest="output", type=text, metavar="FILE.json", help="also write the report to this file")


def system(value: str) -> tuple[str, str]:
    """Argument type: DIR or NAME=DIR -> (name, folder)."""
    name, separator, folder = text(value).partition("=")
    return (name, folder) if separator and name.strip() and folder else (Path(value).resolve().name, value)
