"""The data commands, which make, import, rate and encode pairs of clips."""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import dtype_of, executor_of, report_done

if TYPE_CHECKING:
    from ..data.manifest import ManifestEntry

MAX_WARNINGS = 20  # a table can have millions of rows


def run_data_synth(arguments: argparse.Namespace) -> None:
    from ..data.manifest import export_pairs
    from ..embedded.heldout import drawn_pairs
    from ..embedded.synthetic import PairedEdits

    edits = PairedEdits(
        arguments.seed, arguments.split, arguments.size, arguments.frames, kinds=tuple(arguments.kind) or None, edits=tuple(arguments.edit) or None
    )
    sys.stdout.write(f"{export_pairs(drawn_pairs(edits, arguments.num), arguments.output)}\n")


def run_data_samples(arguments: argparse.Namespace) -> None:
    from ..embedded.sample_pairs import HELD_OUT_PARTS, PARTS, write_pairs
    from ..media.paths import check_output_folder

    output = check_output_folder(arguments.output, "output")
    for name, parts in (("pairs", PARTS), ("heldout", HELD_OUT_PARTS)):
        write_pairs(output / name, parts, "make it look like an old television")
        sys.stdout.write(f"{output / name}\n")


def run_data_import(arguments: argparse.Namespace) -> None:
    from ..data.datasets import import_dataset

    count, left_out = import_dataset(arguments.layout, arguments.folder, arguments.output, tuple(arguments.edit))
    for row in left_out[:MAX_WARNINGS]:
        warnings.warn(f"{row.where} is left out: {row.why}", stacklevel=2)
    if len(left_out) > MAX_WARNINGS:
        warnings.warn(f"{len(left_out) - MAX_WARNINGS} more are left out; {Path(arguments.output).with_suffix('.left_out.jsonl')} names all", stacklevel=2)
    sys.stdout.write(f"{arguments.output}: {count} pairs, {len(left_out)} left out\n")


def run_data_compose(arguments: argparse.Namespace) -> None:
    from functools import partial

    from ..data.compose import ComposeSettings, compose, read_sources
    from ..data.segment_person import Segmenter
    from ..pipeline import check_device

    people, backgrounds = read_sources(arguments.people, "people"), read_sources(arguments.backgrounds, "backgrounds")
    check_device(arguments.device)
    load = partial(Segmenter.load, arguments.segmenter, device=arguments.device) if arguments.segmenter else None
    settings = ComposeSettings(arguments.size, arguments.frames, arguments.seed, arguments.store)
    outcomes, manifest = compose(people, backgrounds, arguments.output, settings, load=load, model_id=arguments.segmenter, executor=executor_of(arguments))
    report_done(manifest, outcomes, 3 * sum(outcome.result is not None for outcome in outcomes))


def run_data_score(arguments: argparse.Namespace) -> None:
    from ..data.folder import read_pairs

    entries = read_pairs(arguments.manifest)
    from functools import partial

    from ..data.judge import Judge
    from ..data.score import score
    from ..pipeline import check_device

    check_device(arguments.device)
    load = partial(Judge.load, arguments.model, dtype=dtype_of(arguments.dtype), device=arguments.device)
    outcomes, kept = score(
        entries,
        load,
        arguments.output,
        min_score=arguments.min_score,
        max_per_kind=arguments.max_per_kind,
        model_id=(arguments.model, arguments.dtype),
        executor=executor_of(arguments),
    )
    report_done(Path(arguments.output), outcomes, len(kept))


def run_data_cache(arguments: argparse.Namespace) -> None:
    from ..data.folder import read_pairs
    from ..media.paths import check_output_folder

    output, entries = check_output_folder(arguments.output, "output"), read_pairs(arguments.manifest)
    encode_pairs(arguments, entries, output, arguments.negative)


def encode_pairs(arguments: argparse.Namespace, entries: "list[ManifestEntry]", output: Path, negative: bool) -> None:
    """Encodes pairs into the cache `output` and says how many."""
    from functools import partial

    from ..pipeline import EMBEDDED
    from ..train.cache import CacheSettings, Encoders, cache

    settings = CacheSettings(tuple(arguments.bucket), arguments.states, negative)
    load = partial(Encoders.load, EMBEDDED.get(arguments.models, arguments.models), dtype=dtype_of(arguments.dtype), device=arguments.device)

    def report(line: str) -> None:
        sys.stderr.write(f"mive: {line}\n")

    index = cache(entries, load(), output, settings, report, executor_of(arguments), load)
    for item in index["skipped"]:
        warnings.warn(f"row {item['pair'] + 1}: {item['name']} is left out: {item['why']}", stacklevel=2)
    sys.stdout.write(f"{output}: {index['pairs']} pairs, {len(index['skipped'])} left out, {index['bytes'] / 1e6:.3g} MB\n")


def run_data_looks(arguments: argparse.Namespace) -> None:
    from ..embedded.heldout import footage_pairs, unseen_look_pairs

    _write_footage(arguments, unseen_look_pairs if arguments.unseen else footage_pairs)


def run_data_recolour(arguments: argparse.Namespace) -> None:
    from ..embedded.heldout import recolour_pairs

    _write_footage(arguments, recolour_pairs)


def run_data_strengths(arguments: argparse.Namespace) -> None:
    from ..embedded.heldout import look_strength_pairs

    _write_footage(arguments, look_strength_pairs)


def run_data_objects(arguments: argparse.Namespace) -> None:
    from ..data.manifest import export_pairs
    from ..embedded.heldout import object_pairs

    frames = _read_footage(arguments)
    sys.stdout.write(f"{export_pairs(object_pairs(frames, arguments.num, arguments.seed, arguments.frames), arguments.output)}\n")


def run_data_challenge(arguments: argparse.Namespace) -> None:
    from ..data.manifest import export_pairs
    from ..embedded.challenge import EDITS, KINDS, ChallengePairs

    footage = _read_footage(arguments) if arguments.source else None
    kinds, edits = tuple(arguments.kind) or KINDS, tuple(arguments.edit) or EDITS
    pairs = ChallengePairs(arguments.seed, arguments.size, arguments.frames, kinds, edits, footage)
    sys.stdout.write(f"{export_pairs(pairs.pairs(arguments.num), arguments.output)}\n")


def _read_footage(arguments: argparse.Namespace):
    """The whole source, fitted to the size -> (F, H, W, 3)."""
    import torch

    from ..media.fit import check_request_size, resize_and_crop
    from ..media.video import stream_clip

    check_request_size(arguments.size)
    return torch.cat([resize_and_crop(frame[None], arguments.size) for frame in stream_clip(arguments.source, what="source")])


def _write_footage(arguments: argparse.Namespace, pairs_of: Callable) -> None:
    from ..data.manifest import export_pairs
    from ..media.fit import fit_clip
    from ..media.video import read_clip

    clip = fit_clip(read_clip(arguments.source, what="source", num_frames=arguments.frames), arguments.size, arguments.frames)
    sys.stdout.write(f"{export_pairs(pairs_of(clip), arguments.output)}\n")
