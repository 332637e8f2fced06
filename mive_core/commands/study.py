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


def run_study_layers(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output_folder
    from ..study.layers.report import write_report
    from ..study.layers.study import LayerStudy, Plan, keep_vlm, runs_of, train_recipe

    output, work = check_output_folder(arguments.output, "output"), check_output_folder(arguments.work, "work folder")
    vlm = check_input(arguments.vlm, "VLM") if arguments.vlm else None
    changes = {"num_steps": arguments.steps, "num_train": arguments.clips, "num_heldout": arguments.heldout, "hours": arguments.hours}
    runs = runs_of(arguments.arm)
    study = LayerStudy(work, Plan(**{name: value for name, value in changes.items() if value is not None}), vlm, arguments.processes)
    study.prepare(train_recipe)
    keep_vlm(study, output)
    study.run_all([run for run in runs if arguments.seed is None or run[1] in arguments.seed], train_recipe)
    write_report(study, output, arguments.command_line)
    sys.stdout.write(f"{output / 'study.json'}\n{output / 'layers.png'}\n")


def run_study_formats(arguments: argparse.Namespace) -> None:
    from ..data.manifest import ManifestPairs, read_manifest
    from ..evaluation.evaluate import write_json
    from ..media.paths import check_output
    from ..study.formats import measure_formats

    output = check_output(arguments.output, "output", (".json",))
    pairs = ManifestPairs(read_manifest(arguments.manifest))
    chosen = [pairs[index] for index in range(min(arguments.num, len(pairs)))]
    measure_formats(chosen, lambda report: write_json(Path(output), {"command": arguments.command_line, **report}))
    sys.stdout.write(f"{output}\n")


def run_study_sizes(arguments: argparse.Namespace) -> None:
    from ..data.manifest import ManifestPairs, read_manifest
    from ..evaluation.evaluate import write_json
    from ..media.paths import check_output
    from ..study.sizes import measure_sizes

    output = check_output(arguments.output, "output", (".json",))
    pairs = ManifestPairs(read_manifest(arguments.manifest), full_size=True)
    measure_sizes(pairs, arguments.num, lambda report: write_json(Path(output), {"command": arguments.command_line, **report}), arguments.models)
    sys.stdout.write(f"{output}\n")
