"""The benchmark commands. Each prints its results as JSON and can write them to a file."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial

from ..errors import UserError
from .arguments import dtype_of, machine_options, settings_of

CARD_DEFAULTS = {"preset": "14b", "size": (1280, 720), "frames": 81, "dtype": "bf16", "blocks": None, "parts": "", "repeats": 3}  # of `mive bench card`


def run_bench_dit(arguments: argparse.Namespace) -> None:
    if arguments.size is not None:
        if arguments.tokens is not None:
            raise UserError("--tokens and --size are two benchmarks", fix="--tokens runs beside diffusers, --size on its own")
        run_bench_stage(arguments)
        return
    from ..bench.against_diffusers import bench_dit, make_ours
    from ..pipeline import check_compiler

    if (arguments.device, arguments.dtype) != ("cpu", "fp32"):
        raise UserError("beside diffusers the DiT runs in fp32 on a CPU", got=f"{arguments.dtype} on {arguments.device}", fix="--size measures it alone")
    if arguments.compile:
        check_compiler("cpu")

    def make(config, layout):
        return make_ours(config, layout, arguments.attention, arguments.compile)

    _report(
        arguments,
        lambda: bench_dit(
            arguments.preset, tokens=arguments.tokens or 2048, blocks=arguments.blocks, repeats=arguments.repeats, threads=arguments.threads, make_ours=make
        ),
    )


def run_bench_stage(arguments: argparse.Namespace) -> None:
    import torch

    from ..bench.models import workload
    from ..bench.stage import bench_stage

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    has_dit = "attention" in arguments
    work = workload(
        arguments.preset,
        size=arguments.size or (96, 96),
        num_frames=arguments.frames,
        device=arguments.device,
        dtype=dtype_of(arguments.dtype),
        repeats=arguments.repeats,
        blocks=arguments.blocks,
        **({"attention": arguments.attention, "compiled": arguments.compile} if has_dit else {}),
    )
    options = {"steps": arguments.steps} if arguments.stage == "edit" else {}
    _report(arguments, lambda: {"preset": arguments.preset, **bench_stage(arguments.stage, work, **options)})


def run_bench_convert(arguments: argparse.Namespace) -> None:
    from ..bench.convert import bench_convert
    from ..media.paths import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    _report(arguments, lambda: bench_convert(arguments.preset, folder=folder, repeats=arguments.repeats))


def run_bench_load(arguments: argparse.Namespace) -> None:
    from ..bench.load import bench_load
    from ..media.paths import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    _report(arguments, lambda: bench_load(arguments.model, shards=arguments.shards, folder=folder, float8=arguments.fp8, blocks=arguments.blocks))


def run_bench_growth(arguments: argparse.Namespace) -> None:
    from ..bench.growth import bench_growth, write_growth
    from ..media.paths import check_output

    plot = check_output(arguments.plot, "plot", (".png",)) if arguments.plot else None

    def measure() -> dict:
        report = bench_growth(
            arguments.preset,
            size=arguments.size,
            blocks=arguments.blocks,
            window_frames=arguments.window,
            overlap_frames=(arguments.window - 1) // 16 * 4 + 1,
            repeats=arguments.repeats,
        )
        if plot:
            write_growth(plot, report)
        return report

    _report(arguments, measure)


def run_bench_long(arguments: argparse.Namespace) -> None:
    from ..bench.long_clips import bench_long_clips
    from ..data.manifest import ManifestPairs, read_manifest
    from ..pipeline import Pipeline

    pairs = ManifestPairs(read_manifest(arguments.manifest), arguments.size, arguments.frames)
    load = partial(Pipeline.load, arguments.models, **machine_options(arguments))
    _report(arguments, lambda: bench_long_clips(load(), pairs, settings_of(arguments), arguments.way))


def run_bench_length(arguments: argparse.Namespace) -> None:
    from ..bench.length import FRAMES, bench_length

    _report(arguments, lambda: bench_length(arguments.size, arguments.edit_size, arguments.frames or FRAMES, arguments.steps))


def run_bench_card(arguments: argparse.Namespace) -> None:
    if arguments.all:
        run_bench_card_all(arguments)
        return
    if given := [f"--{name}" for name in ("scale", "budget") if getattr(arguments, name) is not None]:
        raise UserError(f"{' and '.join(given)} need --all", fix="add --all, or leave them out")
    from ..bench.card import bench_card

    parts = tuple(part for part in arguments.parts.split(",") if part)
    _report(
        arguments,
        lambda: bench_card(
            arguments.preset,
            size=arguments.size,
            num_frames=arguments.frames,
            device=arguments.device,
            dtype=dtype_of(arguments.dtype),
            repeats=arguments.repeats,
            blocks=arguments.blocks,
            parts=parts,
        ),
    )


def run_bench_card_all(arguments: argparse.Namespace) -> None:
    from ..bench.card_all import BUDGET, bench_card_all
    from ..bench.card_goals import print_lines

    if given := [f"--{name}" for name, default in CARD_DEFAULTS.items() if getattr(arguments, name) != default]:
        raise UserError(f"--all has shapes of its own and takes no {', '.join(given)}", fix="leave one of them out")

    def measure() -> dict:
        report = bench_card_all(arguments.device, scale=arguments.scale or "real", budget=arguments.budget or BUDGET)
        for line in print_lines(report["goals"]):
            sys.stderr.write(f"mive: {line}\n")
        return report

    _report(arguments, measure)


def run_bench_cache(arguments: argparse.Namespace) -> None:
    from ..bench.cache import bench_cache
    from ..bench.models import workload
    from ..media.paths import check_input

    folder = check_input(arguments.folder, "folder") if arguments.folder else None
    work = workload(
        arguments.preset, size=arguments.size, num_frames=arguments.frames, device=arguments.device, dtype=dtype_of(arguments.dtype), repeats=arguments.repeats
    )
    _report(arguments, lambda: {"preset": arguments.preset, **bench_cache(work, num_pairs=arguments.pairs, stored_size=arguments.stored_size, folder=folder)})


def run_bench_train(arguments: argparse.Namespace) -> None:
    from ..bench.training import bench_train
    from ..media.paths import check_input

    config = check_input(arguments.config, "config")
    _report(arguments, lambda: bench_train(config, arguments.steps))


def run_bench_scale(arguments: argparse.Namespace) -> None:
    from ..train.budget import scaling_report

    if arguments.frames % 4 != 1:
        raise UserError("the length does not fit", where="--frames", got=arguments.frames, expected="4n+1")
    _report(arguments, lambda: scaling_report(arguments.preset, card=arguments.card, share_of_peak=arguments.share, num_frames=arguments.frames))


def run_bench_parallel(arguments: argparse.Namespace) -> None:
    from ..bench.parallel import parallel_report

    sizes = {"size": arguments.size, "num_frames": arguments.frames}
    _report(arguments, lambda: parallel_report(arguments.preset, **sizes, card=arguments.card, share_of_peak=arguments.share))


def _report(arguments: argparse.Namespace, measure: Callable[[], dict]) -> None:
    """Runs measure() and prints its figures; writes them to --output, if given, whose path is checked before the measurement."""
    from ..media.paths import check_output

    output = check_output(arguments.output, "output", (".json",)) if arguments.output else None
    figures = measure()
    if output:
        from ..evaluation.evaluate import write_json

        write_json(output, figures | {"command": arguments.command_line})
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
