"""The study commands, each of which runs a whole experiment and writes its report."""

import argparse
import sys
from pathlib import Path


def run_study_from_wan(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output_folder
    from ..study.from_wan import Plan, Study, runs_of
    from ..study.report import write_report
    from ..study.samples import write_samples

    output, work = check_output_folder(arguments.output, "output"), check_output_folder(arguments.work, "work folder")
    wan = check_input(arguments.wan, "Wan") if arguments.wan else None
    plan = Plan(**({"num_steps": arguments.steps} if arguments.steps else {}))
    runs = runs_of(arguments.arm)
    study = Study(work, plan, arguments.main, wan)
    study.prepare()
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "small_wan.png").exists():
        write_samples(study.wan, output / "small_wan.png")
    for name, seed, longer in runs:
        if arguments.seed is None or seed in arguments.seed:
            study.train(name, seed, longer)
            write_report(study, output, arguments.command_line)
    write_report(study, output, arguments.command_line)
    sys.stdout.write(f"{Path(output) / 'from_wan.json'}\n{Path(output) / 'from_wan.png'}\n")
