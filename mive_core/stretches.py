"""Clips longer than the model knows are edited in stretches, one after the other. (ours)

Each stretch is an edit of its own: its reference is the last edited frame of the one before, with the source's detail, or a keyframe where
there is one; the VLM reads the stretch alone, and the keyframes are those that lie in it.

F frames of H x W pixels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, repeat
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .config import TEMPORAL_FACTOR
from .delivery import detailed_last_frame, find_shots
from .detail import HALO
from .types import Clip, EditRequest, EditResult

Made = TypeVar("Made")


def edit_in_stretches(request: EditRequest, length: int, edit: Callable[[EditRequest, bool], EditResult]) -> EditResult:
    """Edits a clip of any number of frames, at most `length` = 4n+1 of them at a time.

    edit: a request of 4n+1 frames, and whether it is the clip's last stretch, which alone may lack a round trip -> its result.
    """
    stream = EditStream(request, length, edit, lambda result, _: zip(result.edited.frames, repeat(None) if result.round_trip is None else result.round_trip))
    return stream.collect()


class EditStream(Generic[Made]):
    """The frames of an edit, each beside the source's round trip, made as they are asked for: a stretch is edited when its first frame is.

    What `edit` made of each stretch is kept, so that a second iteration decodes again and edits nothing.
    """

    def __init__(
        self,
        request: EditRequest,
        length: int,
        edit: Callable[[EditRequest, bool], Made],
        decode: Callable[[Made, bool], Iterable[tuple[Tensor, Tensor | None]]],
    ):
        """edit, decode: a stretch's request, or what `edit` made of it, and whether it is the last, which alone may lack a round trip."""
        numbers = latent_order(request.source.frames, length)
        self.kept = [not place or number != numbers[place - 1] for place, number in enumerate(numbers)]
        self.request, self.spans = at_frames(request, numbers), stretches(len(numbers), length)
        self.edit, self.decode = edit, decode
        self.made: list[Made] = []
        self.references = [request.reference]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields edited frame and round trip, (H, W, 3) each, for every frame of the clip."""
        for index, (first, last) in enumerate(self.spans):
            is_last, part = index == len(self.spans) - 1, cut_stretch(self.request, first, last, self.references[index])
            if index == len(self.made):
                self.made.append(self.edit(part, is_last))
            tail: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=1 + HALO)
            for place, pair in enumerate(self.decode(self.made[index], is_last), first):
                tail.append(pair)
                if self.kept[place] and (place > first or not index):
                    yield pair
            if not is_last and index + 1 == len(self.references):
                edited, round_trip = (torch.stack(column) for column in zip(*tail))
                self.references.append(detailed_last_frame(part.source.frames, edited, round_trip).to(self.request.reference))

    def collect(self) -> EditResult:
        """All frames in memory."""
        edited, round_trips = zip(*self)
        round_trip = None if any(frame is None for frame in round_trips) else torch.stack(round_trips)
        return EditResult(Clip(torch.stack(edited), self.request.source.fps), round_trip)


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
