"""Clips longer than the model knows are edited in stretches, one after the other. (ours)

Each stretch is an edit of its own: its reference is the last edited frame of the one before, with the source's detail, or a keyframe where
there is one; the VLM reads the stretch alone, and the keyframes are those that lie in it.

F frames of H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .config import TEMPORAL_FACTOR
from .delivery import detailed_last_frame, find_shots
from .types import Clip, EditRequest, EditResult


def edit_in_stretches(request: EditRequest, length: int, edit: Callable[[EditRequest, bool], EditResult]) -> EditResult:
    """Edits a clip of any number of frames, at most `length` = 4n+1 of them at a time.

    edit: a request of 4n+1 frames, and whether it is the clip's last stretch, which alone may lack a round trip -> its result.
    """
    numbers = latent_order(request.source.frames, length)
    kept = [place for place, number in enumerate(numbers) if not place or number != numbers[place - 1]]
    request = at_frames(request, numbers)
    reference = request.reference
    edited: list[Tensor] = []
    round_trips: list[Tensor] = []
    for first, last in stretches(len(numbers), length):
        part = cut_stretch(request, first, last, reference)
        is_last, repeated = last == len(numbers), 1 if first else 0
        result = edit(part, is_last)
        edited.append(result.edited.frames[repeated:])
        if result.round_trip is not None:
            round_trips.append(result.round_trip[repeated:])
            if not is_last:
                reference = detailed_last_frame(part.source.frames, result.edited.frames, result.round_trip).to(request.reference)
    round_trip = torch.cat(round_trips)[kept] if len(round_trips) == len(edited) else None
    return EditResult(Clip(torch.cat(edited)[kept], request.source.fps), round_trip)


def find_stretches(frames: Tensor, length: int) -> list[tuple[int, int]]:
    """Frames (F, H, W, 3) -> the spans of `latent_order` in which they are edited."""
    return stretches(len(latent_order(frames, length)), length)


def latent_order(frames: Tensor, length: int) -> list[int]:
    """Frames (F, H, W, 3) -> 4n+1 numbers of frames, in order: the last one is repeated as needed.

    In a clip of more than `length` frames the last one of every shot is, so that no latent frame holds a cut.
    """
    starts = find_shots(frames) if len(frames) > length else [0]
    numbers: list[int] = []
    for start, stop in pairwise([*starts, len(frames)]):
        numbers += range(start, stop)
        numbers += [stop - 1] * ((1 - len(numbers)) % TEMPORAL_FACTOR)
    return numbers


def at_frames(request: EditRequest, numbers: Sequence[int]) -> EditRequest:
    """The request for the frames of these numbers, the last of them being the clip's."""
    if len(numbers) == len(request.source.frames):
        return request
    keyframes = tuple(replace(keyframe, number=numbers.index(keyframe.number)) for keyframe in request.keyframes)
    return replace(request, source=replace(request.source, frames=request.source.frames[list(numbers)]), keyframes=keyframes)


def stretches(num_frames: int, length: int) -> list[tuple[int, int]]:
    """Spans of at most `length` frames that cover a clip; each begins with the last frame of the one before. Both numbers are 4n+1.

    All spans have 4n+1 frames, and nearly equally many: a few frames too many do not leave a short rest.
    """
    fours = (num_frames - 1) // TEMPORAL_FACTOR
    num_spans = max(1, -(-fours // ((length - 1) // TEMPORAL_FACTOR)))
    borders = [TEMPORAL_FACTOR * (number * fours // num_spans) for number in range(num_spans + 1)]
    return [(first, last + 1) for first, last in pairwise(borders)]


def latent_spans(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of pixel frames, as `stretches` gives them -> spans of latent frames."""
    return [(first // TEMPORAL_FACTOR, (last - 1) // TEMPORAL_FACTOR + 1) for first, last in spans]


def cut_stretch(request: EditRequest, first: int, last: int, reference: Tensor) -> EditRequest:
    """The request for frames first to last - 1. A keyframe at `first` replaces the reference."""
    keyframes = [replace(keyframe, number=keyframe.number - first) for keyframe in request.keyframes if first <= keyframe.number < last]
    reference = next((keyframe.image for keyframe in keyframes if not keyframe.number), reference)
    source = replace(request.source, frames=request.source.frames[first:last])
    return replace(request, source=source, reference=reference, keyframes=tuple(keyframe for keyframe in keyframes if keyframe.number))
