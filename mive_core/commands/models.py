"""The commands that edit, evaluate and train, and those that inspect or convert checkpoints."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .arguments import dtype_of, entries_of, executor_of, loras_of, machine_options, report_done, settings_of

if TYPE_CHECKING:
    from ..dit import MiVEDiT
    from ..pipeline import Pipeline
    from ..sequence_parallel import Ranks

PLAN_OPTIONS = ("preset", "vlm", "bucket", "states", "pairs", "card", "cards", "share", "output")  # of `mive train --plan`


def run_edit(arguments: argparse.Namespace) -> None:
    if not arguments.sequence_parallel:
        _edit(arguments)
        return
    if arguments.ray:
        raise UserError("the work is distributed by one of them", got="--sequence-parallel and --ray", fix="leave one out")
    from ..sequence_parallel import connected, follow

    with connected(arguments.device) as ranks:
        if ranks.rank:
            follow(ranks, partial(_load_shared_dit, arguments, ranks))
        else:
            _edit(arguments, ranks)


def _edit(arguments: argparse.Namespace, ranks: "Ranks | None" = None) -> None:
    given = [f"--{name}" for name in ("source", "reference", "instruction") if getattr(arguments, name) is not None]
    if arguments.manifest is not None or arguments.benchmark is not None:
        many = "--manifest" if arguments.manifest is not None else "--benchmark"
        given += [f"--{name}" for name in ("fps", "mask") if getattr(arguments, name) is not None] + ["--keyframe"] * bool(arguments.keyframe)
        if given:
            raise UserError(f"a {many[2:]} says all of that", got=f"{many} and {given[0]}", fix="`mive edit --help` lists what it takes")
        _edit_many(arguments, ranks)
        return
    missing = [name for name in ("--source", "--reference", "--instruction") if name not in given]
    if arguments.folder is not None or arguments.references is not None:
        raise UserError("only a benchmark takes that", got="--folder" if arguments.folder is not None else "--references", fix="add --benchmark NAME")
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)}", fix="`mive edit --help` lists what it takes")
    from ..data.edit_file import FileOptions, edit_file, prepare
    from ..data.manifest import ManifestEntry
    from ..media.encode import Encoding
    from ..media.paths import check_input
    from ..media.video import DEFAULT_FPS, check_video_output

    encoding = Encoding(arguments.codec, arguments.crf)
    output = check_video_output(arguments.output, encoding)
    source, reference = check_input(arguments.source, "source"), check_input(arguments.reference, "reference")
    mask = check_input(arguments.mask, "mask") if arguments.mask is not None else None
    keyframes = tuple((number, check_input(path, f"keyframe {number}")) for number, path in arguments.keyframe)
    if output.exists() and any(output.samefile(path) for path in (source, reference, mask, *(path for _, path in keyframes)) if path is not None):
        raise UserError("the output would replace an input", where=f"output {str(output)!r}", fix="choose another name")
    from ..pipeline import find_config

    config, load = find_config(arguments.models), _pipeline_loader(arguments, ranks)
    options = FileOptions(arguments.size, arguments.frames, arguments.detail, arguments.anchor, mask, arguments.register, encoding)
    entry = ManifestEntry(source, reference, arguments.instruction, fps=arguments.fps or DEFAULT_FPS, keyframes=keyframes)
    prepared = prepare(entry, config, options)
    path, _ = edit_file(load(), prepared, output, settings_of(arguments), options)
    sys.stdout.write(f"{path}\n")


def _edit_many(arguments: argparse.Namespace, ranks: "Ranks | None") -> None:
    from ..media.paths import check_output_folder

    output, entries = check_output_folder(arguments.output, "output"), entries_of(arguments)
    from ..data.edit_file import FileOptions
    from ..data.edits import JOURNAL, edit_all
    from ..media.encode import Encoding

    options, loras, load = machine_options(arguments), loras_of(arguments), _pipeline_loader(arguments, ranks)
    identity: tuple[object, ...] = (arguments.models, arguments.layers, sorted((key, str(value)) for key, value in options.items()))
    if loras:
        identity += ([(str(path), path.stat().st_mtime_ns, strength) for path, strength in loras],)
    outcomes = edit_all(
        entries,
        load,
        output,
        settings_of(arguments),
        options=FileOptions(
            arguments.size,
            arguments.frames,
            arguments.detail,
            arguments.anchor,
            registered=arguments.register,
            encoding=Encoding(arguments.codec, arguments.crf),
        ),
        model_id=identity,
        executor=executor_of(arguments),
    )
    report_done(output / JOURNAL, outcomes)


def _pipeline_loader(arguments: argparse.Namespace, ranks: "Ranks | None") -> "Callable[[], Pipeline]":
    """Returns what loads the models, with blocks that all ranks run, if there are several.

    Raises UserError for LoRAs that are not there, and for processes that do not fit the model.
    """
    from ..pipeline import Pipeline, find_config

    load = partial(Pipeline.load, arguments.models, arguments.layers, **machine_options(arguments), loras=loras_of(arguments))
    if ranks is None:
        return load
    from ..sequence_parallel import SharedBlocks, prepare_ranks

    prepare_ranks(ranks, find_config(arguments.models))

    def load_shared() -> Pipeline:
        pipeline = load()
        SharedBlocks(pipeline.dit, ranks)
        return pipeline

    return load_shared


def _load_shared_dit(arguments: argparse.Namespace, ranks: "Ranks") -> "MiVEDiT":
    """Returns the DiT of a rank that only runs blocks. Warns of nothing, for rank 0 does."""
    from ..pipeline import find_config, fitting_loras, load_with_loras
    from ..sequence_parallel import prepare_ranks

    warnings.simplefilter("ignore")
    prepare_ranks(ranks, find_config(arguments.models))
    return load_with_loras(arguments.models, fitting_loras(arguments.models, loras_of(arguments)), **machine_options(arguments))


def run_eval(arguments: argparse.Namespace) -> None:
    from ..data.manifest import ManifestPairs
    from ..media.paths import check_output_folder

    output, entries = check_output_folder(arguments.output, "output"), entries_of(arguments)
    pairs, loras = ManifestPairs(entries, arguments.size, arguments.frames), loras_of(arguments)
    from ..evaluation.before import Before
    from ..evaluation.evaluate import evaluate
    from ..evaluation.full_size import FullSizePairs
    from ..pipeline import Pipeline

    groups = {"kind": [entry.kind for entry in entries], "edit": [entry.edit for entry in entries]}
    if arguments.benchmark:
        from ..data.benchmarks import reference_kinds

        groups = {"kind": groups["kind"], "reference": reference_kinds(entries)}
    before = Before.read(Path(arguments.before), [entry.name for entry in entries]) if arguments.before else None
    evaluate(
        Pipeline.load(arguments.models, arguments.layers, **machine_options(arguments), loras=loras),
        pairs,
        output,
        settings_of(arguments, reference_mode=arguments.reference_mode, instruction_mode=arguments.instruction_mode),
        groups=groups,
        full_size=None if arguments.raw_only or arguments.benchmark else FullSizePairs(replace(pairs, size=None, full_size=True), arguments.size),
        before=before,
        command=arguments.command_line,
    )
    sys.stdout.write(f"{output / 'report.json'}\n{output / 'sheet.png'}\n")


def run_train(arguments: argparse.Namespace) -> None:
    given = [f"--{'json' if name == 'output' else name}" for name in PLAN_OPTIONS if getattr(arguments, name) is not None]
    if arguments.plan:
        _plan(arguments)
        return
    if given:
        raise UserError("only a plan takes that", got=given[0], fix="add --plan")
    from ..media.paths import check_input
    from ..study.tasks import TASKS
    from ..train.tasks import train

    train(check_input(arguments.config, "config"), TASKS)


def run_distill(arguments: argparse.Namespace) -> None:
    from ..data.folder import read_pairs
    from ..formats.checkpoint import read_config
    from ..formats.safetensors_file import resolve
    from ..media.paths import check_output, check_output_folder
    from ..pipeline import EMBEDDED
    from ..train.distill import recipe_values
    from ..train.recipe import write_recipe
    from ..train.tasks import train
    from .data import encode_pairs

    output = check_output(arguments.output, "output", (".safetensors",))
    work = check_output_folder(arguments.work or output.with_suffix(""), "work")
    entries = read_pairs(arguments.manifest)
    checkpoint = resolve(Path(EMBEDDED.get(arguments.models, arguments.models)), "dit.safetensors")
    cfg = arguments.teacher_cfg or read_config(checkpoint).cfg
    values = {name: getattr(arguments, name) for name in ("num_steps", "student_steps", "teacher_steps", "lora_rank", "learning_rate", "batch_size", "device")}
    values |= {"start_from": str(checkpoint), "caches": [str(work / "cache")], "output_dir": str(work / "run"), "export": str(output), "teacher_cfg": cfg}
    recipe = write_recipe(work / "recipe.yaml", recipe_values(values, arguments.dtype != "fp32"))
    encode_pairs(arguments, entries, work / "cache", cfg != 1.0)
    train(recipe)
    sys.stdout.write(f"{output}: a LoRA for {arguments.student_steps} steps without guidance\n")


def _plan(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output

    output = check_output(arguments.output, "output", (".json",)) if arguments.output else None
    if arguments.vlm and not arguments.preset:
        raise UserError("the checkpoint says which VLM it reads", got="--vlm without --preset")
    from ..evaluation.evaluate import write_json
    from ..train.budget import SHARE_OF_PEAK
    from ..train.plan import PlanOptions, describe_plan, plan

    options = PlanOptions(
        arguments.preset or "",
        arguments.vlm or "8b",
        tuple(arguments.bucket or ()),
        arguments.states or "",
        arguments.pairs or 0,
        arguments.card or "",
        arguments.cards or 0,
        arguments.share or SHARE_OF_PEAK,
    )
    report = plan(check_input(arguments.config, "config"), options)
    if output:
        write_json(output, report | {"command": arguments.command_line})
    sys.stdout.write(describe_plan(report))


def run_inspect(arguments: argparse.Namespace) -> None:
    from ..formats.checkpoint import inspect
    from ..media.paths import check_input

    sys.stdout.write(json.dumps(inspect(check_input(arguments.path, "checkpoint")), indent=2) + "\n")


def run_init_from_wan(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_output

    destination = check_output(arguments.destination, "destination", (".safetensors",))
    from ..formats.checkpoint import inspect
    from ..formats.from_wan import init_from_wan

    init_from_wan(arguments.source, destination, layers=arguments.layers, vlm=arguments.vlm, dtype=dtype_of(arguments.dtype))
    sys.stdout.write(json.dumps(inspect(destination), indent=2) + "\n")


def run_quantize(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output

    destination = check_output(arguments.destination, "destination", (".safetensors",))
    from ..formats.quantize import quantize

    report = quantize(check_input(arguments.source, "checkpoint"), destination, arguments.format, arguments.keep_blocks)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def run_merge(arguments: argparse.Namespace) -> None:
    from ..media.paths import check_input, check_output

    destination, loras = check_output(arguments.destination, "destination", (".safetensors",)), loras_of(arguments)
    from ..formats.merge import merge

    report = merge(check_input(arguments.base, "checkpoint"), loras, destination, arguments.dtype)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def run_demo(arguments: argparse.Namespace) -> None:
    from .demo import run_demo as run

    report = run(arguments.output, arguments.models, settings_of(arguments), arguments.command_line)
    sys.stdout.write(
        f"{Path(arguments.output) / 'edited.mp4'}\n{Path(arguments.output) / 'sheet.png'}\n"
        f"{Path(arguments.output) / 'report.json'}: {report['seconds']:.0f} s\n"
    )
