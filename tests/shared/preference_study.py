"""A small study: clips, systems, and the votes that a rater would download."""

from mive_core.preference.votes import VOTES_FORMAT, checksum

CLIPS = ("a cat", "two dogs", "three")
SYSTEMS = ("gorilla-systems", "zebra-systems")  # words that the page's own text does not hold
TIME = "2026-01-02T03:04:05.678Z"


def votes_file(key: dict, rater: str, preferred: str | None, *, scores: dict[str, int] | None = None, **changes) -> dict:
    """The file of a rater who prefers one system on every clip, or (None) sees no difference; `scores` are by system."""
    votes = []
    for token, pair in key["comparisons"].items():
        sides = {"left": pair["first"], "right": pair["second"]}
        choice = next((side for side, video in sides.items() if key["videos"][video]["system"] == preferred), "tie")
        votes.append({"comparison": token, **sides, "choice": choice, "milliseconds": 1500, "time": TIME})
    values = {
        "format": VOTES_FORMAT,
        "page": key["page"],
        "session": f"session of {rater}",
        "rater": rater,
        "saved": TIME,
        "num_comparisons": len(votes),
        "votes": votes,
        "scores": [{"video": token, "score": scores[video["system"]], "time": TIME} for token, video in key["videos"].items()] if scores else [],
    } | changes
    return values | {"checksum": checksum(values)}
