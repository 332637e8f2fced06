"""One edit from file to file: made at the size that the model knows best, delivered at the source's own size and length.

Source, edit and output are streamed: of the whole clip memory holds what the model reads, the source at the edit's size, and latents.
"""

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from ..config import MiVEConfig, latent_grid
from ..delivery import EditedFrame, deliver_stream
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings, show_steps
from ..media.encode import Encoding
from ..media.fit import check_frames, check_request_frames, check_request_size, edit_size, fit_reference, resize, valid_num_frames
from ..media.remote import local_copy
from ..media.video import read_clip, read_fps, stream_clip, write_stream
from ..pipeline import Pipeline
from ..reference import check_keyframes
from ..reference_check import warn_of_references
from ..registration import register
from ..types import Clip, EditRequest
from .manifest import ManifestEntry, read_keyframes, read_reference

DETAIL = ("auto", "off")
MANY_TOKENS = 20_000  # above this number an edit warns that it may take long
MAX_STRETCH = 1.1  # of one side against the other, from which a --size warns that the picture is distorted while it is edited


@dataclass(frozen=True)
class FileOptions:
    """How files are edited."""

    size: tuple[int, int] | None = None  # width and height of the edit; None: what the model knows best, in nearly the source's shape
    num_frames: int | None = None  # the first frames alone, 4n+1; None: all
    detail: str = "auto"  # off: the edit's own pixels at the edit's size
    anchor: str = "auto"  # as in deliver
    mask: Path | None = None  # video or image, white where the edit may act
    registered: bool = False  # whether reference and keyframes are registered to their frames of the source
    encoding: Encoding = field(default_factory=Encoding)  # of the output


@dataclass(frozen=True)
class PreparedEdit:
    """What the model reads, and what delivery needs beside its result."""

    request: EditRequest  # at the edit's size, F = 4n+1 frames: the last one is repeated where the source has fewer
    source: Path
    num_frames: int  # of the source
    size: tuple[int, int]  # width, height of the source
    reference: Tensor  # (H, W, 3), fitted to the source's size
    keyframes: tuple[EditedFrame, ...]  # likewise
    mask: Tensor | None  # (1 or F, H', W') in 0..1


def prepare(entry: ManifestEntry, config: MiVEConfig, options: FileOptions = FileOptions()) -> PreparedEdit:
    """Reads an entry's source, reference (else its target's first frame), keyframes and the mask.

    Warns of edited frames that do not look like the source's. Raises UserError for what cannot be read or does not fit.
    """
    entry.check()
    if options.num_frames is not None:
        check_request_frames(options.num_frames)
    if options.size is not None:
        check_request_size(options.size)
    source, where = local_copy(entry.source, "source"), f"source {str(entry.source)!r}"
    frames, size, small = [], (0, 0), (0, 0)
    numbers = [0, *(number for number, _ in entry.keyframes)]
    sharp = {}  # the frames that reference and keyframes were made from
    for index, frame in enumerate(stream_clip(source, what="source", num_frames=options.num_frames)):
        if not index:
            check_frames(frame[None], where)
            size = (frame.shape[1], frame.shape[0])
            small = options.size or edit_size(size, config.edit_pixels)
        frames.append(resize(frame, small))
        if index in numbers:
            sharp[index] = frame
    if options.num_frames is not None and len(frames) < options.num_frames:
        fix = f"ask for {valid_num_frames(len(frames))} or fewer"
        raise UserError("the clip is shorter than asked", where=where, got=f"{len(frames)} frames", expected=options.num_frames, fix=fix)
    stretch = small[0] * size[1] / (small[1] * size[0])
    if max(stretch, 1 / stretch) > MAX_STRETCH:
        warnings.warn(f"{where}: {size[0]}x{size[1]} is distorted to {small[0]}x{small[1]} while it is edited; choose a size of its shape", stacklevel=2)
    num_frames = len(frames)
    padded = frames + frames[-1:] * (-(num_frames - 1) % 4)
    if entry.reference is not None:
        image = read_reference(entry)
    elif entry.target is not None:
        image = next(stream_clip(local_copy(entry.target, "target"), what="target", num_frames=1))
    else:
        raise UserError("there is neither a reference nor a target", where=entry.title)
    reference = fit_reference(image, size, f"reference {str(entry.reference)!r}")
    check_keyframes(numbers[1:], num_frames, config.keyframes)
    keyframes = read_keyframes(entry, size)
    if options.registered:
        reference = register(reference, sharp[0])
        keyframes = tuple(replace(keyframe, image=register(keyframe.image, sharp[keyframe.number])) for keyframe in keyframes)
    request = EditRequest(
        Clip(torch.stack(padded), read_fps(source, entry.fps)),
        resize(reference, small),
        entry.instruction,
        tuple(replace(keyframe, image=resize(keyframe.image, small)) for keyframe in keyframes),
    )
    warn_of_references(request.source.frames, request.reference, request.keyframes)
    mask = None
    if options.mask is not None:
        mask = read_clip(options.mask, what="mask", num_frames=num_frames).frames.mean(dim=-1)
    _warn_of_many_tokens(request, config, where, options)
    pairs = tuple(EditedFrame(keyframe.number, sharp[keyframe.number], keyframe.image) for keyframe in keyframes)
    return PreparedEdit(request, source, num_frames, size, reference, pairs, mask)


def edit_file(
    pipeline: Pipeline, prepared: PreparedEdit, output: str | Path, settings: EvaluationSettings, options: FileOptions = FileOptions()
) -> tuple[Path, float]:
    """Edits and writes the video, with the source's sound -> its path, and the seconds that the edit took, delivery left out. Raises UserError."""
    keep_detail = options.detail == "auto"
    pairs = TimedPairs(pipeline.stream(prepared.request, **settings.sampling, progress=show_steps, with_round_trip=keep_detail))
    if keep_detail:
        source, size = islice(stream_clip(prepared.source, what="source"), prepared.num_frames), prepared.size
        count, keyframes = prepared.num_frames, prepared.keyframes
        frames = deliver_stream(source, pairs, count, prepared.reference, prepared.mask, anchor=options.anchor, keyframes=keyframes)
    else:
        height, width = prepared.request.source.frames.shape[1:3]
        frames, size = (edited for edited, _ in islice(pairs, prepared.num_frames)), (width, height)
    path = write_stream(output, frames, size, prepared.request.source.fps, sound=prepared.source, encoding=options.encoding)
    return path, pairs.seconds


class TimedPairs:
    """Pairs of frames as they come, and the seconds that they took to come."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]):
        self.pairs, self.seconds = pairs, 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        iterator, start = iter(self.pairs), time.perf_counter()
        for pair in iterator:
            self.seconds += time.perf_counter() - start
            yield pair
            start = time.perf_counter()


def _warn_of_many_tokens(request: EditRequest, config: MiVEConfig, where: str, options: FileOptions) -> None:
    num_frames, height, width = request.source.frames.shape[:3]
    num_latent_frames, *cells = latent_grid(num_frames, height, width)
    num_references = 1 + len(request.keyframes)
    num_tokens = math.prod(config.patch_grid(num_latent_frames + num_references, *cells))
    if num_tokens > MANY_TOKENS and options.size is None:
        warnings.warn(
            f"{where}: {num_frames} frames of {width}x{height} are {num_tokens} tokens, which may take long; --size and --frames make them fewer", stacklevel=2
        )
