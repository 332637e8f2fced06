"""The commands of blind comparisons."""

import argparse
import sys


def run_preference_make(arguments: argparse.Namespace) -> None:
    from ..data.folder import read_pairs
    from ..preference.page import MEGABYTE, PageOptions, make_page
    from ..preference.systems import read_systems

    entries = read_pairs(arguments.manifest, allow_empty_instruction=True)
    systems = read_systems(arguments.systems, entries)
    options = PageOptions(arguments.scores, arguments.height, arguments.crf, round(arguments.max_size * MEGABYTE))

    def report(line: str) -> None:
        sys.stderr.write(f"mive: {line}\n")

    page, key = make_page(entries, systems, arguments.output, options, report, arguments.command_line)
    sys.stdout.write(f"{page}\n{key}\n")


def run_preference_report(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_output

    output = check_output(arguments.output, "output", (".json",)) if arguments.output else None
    from ..evaluation.evaluate import write_json
    from ..preference.report import describe_report, make_report
    from ..preference.votes import read_key, read_votes

    key = read_key(arguments.key)
    report = make_report(key, *read_votes(arguments.votes, key), arguments.command_line)
    if output:
        write_json(output, report)
    sys.stdout.write(describe_report(report))
