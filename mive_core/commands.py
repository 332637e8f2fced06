"""What each command does: check its paths, call the library, print where the result is.

The heavy imports stand inside the functions, so that `mive --help` answers at once.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from .errors import UserError

MANY_TOKENS = 20_000
MOST_NAMED = 20  # rows of a table of millions


def run_edit(arguments: argparse.Namespace) -> None:
    given = [f"--{name}" for name in ("source", "reference", "instruction") if getattr(arguments, name) is not None]
    if arguments.manifest is not None:
        if given or arguments.fps:
            raise UserError("a manifest says all of that", got=f"--manifest and {(given or ['--fps'])[0]}", fix="`mive edit --help` lists what it takes")
        _edit_many(arguments)
        return
    missing = [name for name in ("--source", "--reference", "--instruction") if name not in given]
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)}", fix="`mive edit --help` lists what it takes")
    from .files import check_input, check_output
    from .manifest import ManifestEntry, load_entry
    from .video import DEFAULT_FPS, VIDEO_SUFFIXES, write_video

    output = check_output(arguments.output, "output", VIDEO_SUFFIXES)
    source, reference = check_input(arguments.source, "source"), check_input(arguments.reference, "reference")
    if output.exists() and (output.samefile(source) or output.samefile(reference)):
        raise UserError("the output would replace an input", where=f"output {str(output)!r}", fix="choose another name")
    request = load_entry(ManifestEntry(source, reference, arguments.instruction, fps=arguments.fps or DEFAULT_FPS),
                         arguments.size, arguments.frames).request
    num_frames, height, width = request.source.frames.shape[:3]
    num_tokens = ((num_frames - 1) // 4 + 2) * (height // 16) * (width // 16)
    if num_tokens > MANY_TOKENS and arguments.size is None:
        warnings.warn(f"{num_frames} frames of {width}x{height} are {num_tokens} tokens, which may take long; --size and --frames make them fewer")
    from .evaluate import timed_edit
    from .sample import Pipeline

    edited, _ = timed_edit(Pipeline.load(arguments.models, arguments.layers, **_machine(arguments)), request, _settings(arguments))
    sys.stdout.write(f"{write_video(output, edited)}\n")


def _edit_many(arguments: argparse.Namespace) -> None:
    from .files import check_output_folder
    from .pairs import read_pairs

    output, entries = check_output_folder(arguments.output, "output"), read_pairs(arguments.manifest, may_be_silent=True)
    from functools import partial

    from .data.edits import JOURNAL, edit_all
    from .sample import Pipeline

    machine = _machine(arguments)
    load = partial(Pipeline.load, arguments.models, arguments.layers, **machine)
    outcomes = edit_all(entries, load, output, _settings(arguments), size=arguments.size, num_frames=arguments.frames,
                        made_by=(arguments.models, arguments.layers, sorted((key, str(value)) for key, value in machine.items())), how=_spread(arguments))
    _done(output / JOURNAL, outcomes)


def run_eval(arguments: argparse.Namespace) -> None:
    from .files import check_output_folder
    from .manifest import ManifestPairs, read_manifest

    output = check_output_folder(arguments.output, "output")
    entries = read_manifest(arguments.manifest)
    pairs = ManifestPairs(entries, arguments.size, arguments.frames)
    from .evaluate import evaluate
    from .sample import Pipeline

    evaluate(Pipeline.load(arguments.models, arguments.layers, **_machine(arguments)), pairs, output,
             _settings(arguments, reference_mode=arguments.reference_mode, instruction_mode=arguments.instruction_mode),
             groups={"kind": [entry.kind for entry in entries], "edit": [entry.edit for entry in entries]},
             command=arguments.command_line)
    sys.stdout.write(f"{output / 'report.json'}\n{output / 'sheet.png'}\n")


def run_train(arguments: argparse.Namespace) -> None:
    from .files import check_input
    from .train.dispatch import train

    train(check_input(arguments.config, "config"))


def run_inspect(arguments: argparse.Namespace) -> None:
    from .checkpoint import inspect
    from .files import check_input

    sys.stdout.write(json.dumps(inspect(check_input(arguments.path, "checkpoint")), indent=2) + "\n")


def run_init_from_wan(arguments: argparse.Namespace) -> None:
    from .files import check_output

    destination = check_output(arguments.destination, "destination", (".safetensors",))
    from .checkpoint import inspect
    from .convert import init_from_wan

    init_from_wan(arguments.source, destination, layers=arguments.layers, vlm=arguments.vlm, dtype=_dtype(arguments.dtype))
    sys.stdout.write(json.dumps(inspect(destination), indent=2) + "\n")


def run_quantize(arguments: argparse.Namespace) -> None:
    from .files import check_input, check_output

    destination = check_output(arguments.destination, "destination", (".safetensors",))
    from .quantize import quantize

    report = quantize(check_input(arguments.source, "checkpoint"), destination, arguments.format)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


def run_bench_dit(arguments: argparse.Namespace) -> None:
    if arguments.size is not None:
        if arguments.tokens is not None:
            raise UserError("--tokens and --size are two benchmarks", fix="--tokens runs beside diffusers, --size on its own")
        run_bench_stage(arguments)
        return
    from .bench.rival import bench_dit, make_ours
    from .sample import check_compiler

    if (arguments.device, arguments.dtype) != ("cpu", "fp32"):
        raise UserError("beside diffusers the DiT runs in fp32 on a CPU", got=f"{arguments.dtype} on {arguments.device}", fix="--size measures it alone")
    if arguments.compile:
        check_compiler("cpu")

    def make(config, layout):
        return make_ours(config, layout, arguments.attention, arguments.compile)

    _report(arguments, lambda: bench_dit(arguments.preset, tokens=arguments.tokens or 2048, blocks=arguments.blocks, repeats=arguments.repeats,
                                         threads=arguments.threads, make_ours=make))


def run_bench_stage(arguments: argparse.Namespace) -> None:
    import torch

    from .bench.models import workload
    from .bench.stage import bench_stage

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    has_dit = "attention" in arguments
    work = workload(arguments.preset, size=arguments.size or (96, 96), num_frames=arguments.frames, device=arguments.device,
                    dtype=_dtype(arguments.dtype), repeats=arguments.repeats, blocks=arguments.blocks,
                    **({"attention": arguments.attention, "compiled": arguments.compile} if has_dit else {}))
    options = {"steps": arguments.steps} if arguments.stage == "edit" else {}
    _report(arguments, lambda: {"preset": arguments.preset, **bench_stage(arguments.stage, work, **options)})


def run_bench_convert(arguments: argparse.Namespace) -> None:
    from .bench.convert import bench_convert
    from .files import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    _report(arguments, lambda: bench_convert(arguments.preset, folder=folder, repeats=arguments.repeats))


def run_bench_load(arguments: argparse.Namespace) -> None:
    from .bench.load import bench_load
    from .files import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    _report(arguments, lambda: bench_load(arguments.model, shards=arguments.shards, folder=folder, float8=arguments.fp8, blocks=arguments.blocks))


def run_bench_growth(arguments: argparse.Namespace) -> None:
    from .bench.growth import bench_growth, write_growth
    from .files import check_output

    plot = check_output(arguments.plot, "plot", (".png",)) if arguments.plot else None

    def measure() -> dict:
        report = bench_growth(arguments.preset, size=arguments.size, blocks=arguments.blocks, window_frames=arguments.window,
                              overlap_frames=(arguments.window - 1) // 16 * 4 + 1, repeats=arguments.repeats)
        if plot:
            write_growth(plot, report)
        return report

    _report(arguments, measure)


def run_bench_card(arguments: argparse.Namespace) -> None:
    from .bench.card import bench_card

    parts = tuple(part for part in arguments.parts.split(",") if part)
    _report(arguments, lambda: bench_card(arguments.preset, size=arguments.size, num_frames=arguments.frames, device=arguments.device, dtype=_dtype(arguments.dtype),
                                          repeats=arguments.repeats, blocks=arguments.blocks, parts=parts))


def run_bench_cache(arguments: argparse.Namespace) -> None:
    from .bench.cache import bench_cache
    from .bench.models import workload
    from .files import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    work = workload(arguments.preset, size=arguments.size, num_frames=arguments.frames, device=arguments.device, dtype=_dtype(arguments.dtype), repeats=arguments.repeats)
    _report(arguments, lambda: {"preset": arguments.preset, **bench_cache(work, num_pairs=arguments.pairs, stored_size=arguments.stored_size, folder=folder)})


def run_bench_train(arguments: argparse.Namespace) -> None:
    from .files import check_input
    from .train.dispatch import bench_train

    config = check_input(arguments.config, "config")
    _report(arguments, lambda: bench_train(config, arguments.steps))


def run_bench_scale(arguments: argparse.Namespace) -> None:
    from .train.budget import scale

    if arguments.frames % 4 != 1:
        raise UserError("the length does not fit", where="--frames", got=arguments.frames, expected="4n+1")
    _report(arguments, lambda: scale(arguments.preset, card=arguments.card, share_of_peak=arguments.share, num_frames=arguments.frames))


def _report(arguments: argparse.Namespace, measure: Callable[[], dict]) -> None:
    """Figures to stdout, and to the file that was asked for, whose name is checked before the measuring."""
    from .files import check_output

    output = check_output(arguments.output, "output", (".json",)) if arguments.output else None
    figures = measure()
    if output:
        from .evaluate import write_json

        write_json(output, figures | {"command": arguments.command_line})
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


def run_data_synth(arguments: argparse.Namespace) -> None:
    from .manifest import export_pairs
    from .train.heldout import drawn_pairs
    from .train.synth import PairedEdits

    edits = PairedEdits(arguments.seed, arguments.split, arguments.size, arguments.frames, kinds=tuple(arguments.kind) or None, edits=tuple(arguments.edit) or None)
    sys.stdout.write(f"{export_pairs(drawn_pairs(edits, arguments.num), arguments.output)}\n")


def run_data_import(arguments: argparse.Namespace) -> None:
    from .data.published import import_set

    count, left_out = import_set(arguments.layout, arguments.folder, arguments.output, tuple(arguments.edit))
    for row in left_out[:MOST_NAMED]:
        warnings.warn(f"{row.where} is left out: {row.why}")
    if len(left_out) > MOST_NAMED:
        warnings.warn(f"{len(left_out) - MOST_NAMED} more are left out; {Path(arguments.output).with_suffix('.left_out.jsonl')} names all")
    sys.stdout.write(f"{arguments.output}: {count} pairs, {len(left_out)} left out\n")


def run_data_compose(arguments: argparse.Namespace) -> None:
    from functools import partial

    from .data.compose import ComposeSettings, compose, read_sources
    from .data.person import Segmenter
    from .sample import check_device

    people, backgrounds = read_sources(arguments.people, "people"), read_sources(arguments.backgrounds, "backgrounds")
    check_device(arguments.device)
    load = partial(Segmenter.load, arguments.segmenter, device=arguments.device) if arguments.segmenter else None
    settings = ComposeSettings(arguments.size, arguments.frames, arguments.seed, arguments.store)
    outcomes, manifest = compose(people, backgrounds, arguments.output, settings, load=load, made_by=arguments.segmenter, how=_spread(arguments))
    _done(manifest, outcomes, 3 * sum(outcome.result is not None for outcome in outcomes))


def run_data_score(arguments: argparse.Namespace) -> None:
    from .pairs import read_pairs

    entries = read_pairs(arguments.manifest)
    from functools import partial

    from .data.judge import Judge
    from .data.score import score
    from .sample import check_device

    check_device(arguments.device)
    load = partial(Judge.load, arguments.model, dtype=_dtype(arguments.dtype), device=arguments.device)
    outcomes, kept = score(entries, load, arguments.output, least=arguments.least, most=arguments.most, made_by=(arguments.model, arguments.dtype),
                           how=_spread(arguments))
    _done(Path(arguments.output), outcomes, len(kept))


def run_data_cache(arguments: argparse.Namespace) -> None:
    from .files import check_output_folder
    from .pairs import read_pairs

    output, entries = check_output_folder(arguments.output, "output"), read_pairs(arguments.manifest)
    from functools import partial

    from .sample import EMBEDDED
    from .train.cache import CacheSettings, Encoders, cache

    settings = CacheSettings(tuple(arguments.bucket), arguments.states, arguments.negative)
    load = partial(Encoders.load, EMBEDDED.get(arguments.models, arguments.models), dtype=_dtype(arguments.dtype), device=arguments.device)
    index = cache(entries, load(), output, settings, lambda line: sys.stderr.write(f"mive: {line}\n"), _spread(arguments), load)
    for item in index["skipped"]:
        warnings.warn(f"pair {item['pair'] + 1} ({item['name']}) is left out: {item['why']}")
    sys.stdout.write(f"{output}: {index['pairs']} pairs, {len(index['skipped'])} left out, {index['bytes'] / 1e6:.3g} MB\n")


def run_data_looks(arguments: argparse.Namespace) -> None:
    from .train.heldout import footage_pairs, unseen_look_pairs

    _write_footage(arguments, unseen_look_pairs if arguments.unseen else footage_pairs)


def run_data_recolour(arguments: argparse.Namespace) -> None:
    from .train.heldout import recolour_pairs

    _write_footage(arguments, recolour_pairs)


def _write_footage(arguments: argparse.Namespace, pairs_of: Callable) -> None:
    from .manifest import export_pairs
    from .pixels import fit_clip
    from .video import read_clip

    clip = fit_clip(read_clip(arguments.source, what="source", num_frames=arguments.frames), arguments.size, arguments.frames)
    sys.stdout.write(f"{export_pairs(pairs_of(clip), arguments.output)}\n")


def run_demo(arguments: argparse.Namespace) -> None:
    from .demo import run_demo as run

    report = run(arguments.output, arguments.models, _settings(arguments), arguments.command_line)
    sys.stdout.write(f"{Path(arguments.output) / 'edited.mp4'}\n{Path(arguments.output) / 'sheet.png'}\n"
                     f"{Path(arguments.output) / 'report.json'}: {report['seconds']:.0f} s\n")


def _spread(arguments: argparse.Namespace):
    from .data.spread import Spread, check_ray

    if arguments.ray:
        check_ray()
    return Spread(arguments.ray, arguments.workers, 1 if getattr(arguments, "device", "cpu") == "cuda" else 0)


def _done(where: Path, outcomes: list, kept: int | None = None) -> None:
    """Names what is left out, and counts."""
    left_out = [outcome for outcome in outcomes if outcome.result is None]
    for outcome in left_out:
        warnings.warn(f"{outcome.title} is left out: {outcome.why}")
    sys.stdout.write(f"{where}: {len(outcomes) - len(left_out)} done, {len(left_out)} left out{'' if kept is None else f', {kept} kept'}\n")


def _machine(arguments: argparse.Namespace) -> dict:
    """What Pipeline.load is told about the machine."""
    return {"device": arguments.device, "dtype": _dtype(arguments.dtype), "attention": arguments.attention, "compiled": arguments.compile,
            "float8": arguments.fp8}


def _dtype(name: str | None):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[name]


def _settings(arguments: argparse.Namespace, **modes: str):
    from .evaluate import EvaluationSettings

    return EvaluationSettings(arguments.steps, arguments.cfg, arguments.shift, arguments.seed, **modes)
