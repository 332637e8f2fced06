"""Delivery: an edit made at the model's size becomes frames of the source's size, with the source's detail and the reference's colours.

Frames come one by one and go one by one, so memory does not grow with the source's size times its length.

F frames; h x w pixels of the edit, H x W of the source.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_low

import torch
from torch import Tensor
from torch.nn import functional as F

from .anchor import Anchor, apply_anchor, fit_anchor, lacks_edit, restore, shows_edit
from .detail import HALO, apply_color_map, fit_color_maps
from .errors import UserError
from .media.fit import resize_and_crop
from .registration import register

ANCHORS = ("auto", "on", "off")
CHUNK, CHUNK_PIXELS = 16, 1_600_000  # frames whose maps are fitted together, and their pixels in all, at most
CUT, CUT_RATIO = 0.10, 4.0  # mean change from which a frame may begin a shot, and how many times that of its neighbours
BESIDE = 3  # how many neighbours to each side
LARGEST_WINDOW = CHUNK + 2 * HALO + BESIDE  # pairs of an edit's frame and its round trip that are held at once, at most
FEATHER = 1 / 64  # of the shorter side: how far inside a mask's border the edit fades in


@dataclass(frozen=True)
class EditedFrame:
    """An edited frame beside the frame of the source that it was made from."""

    number: int  # of the frame, counted from 0
    source: Tensor  # (H, W, 3) in 0..1
    image: Tensor  # (H', W', 3) in 0..1


def deliver(
    frames: Iterable[Tensor],
    edited: Tensor,
    round_trip: Tensor,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    anchor: str = "auto",
    keyframes: Sequence[EditedFrame] = (),
) -> Iterator[Tensor]:
    """Yields one delivered frame, (H, W, 3) in 0..1, per frame of the source.

    frames: F times (H, W, 3) in 0..1, with the same framing as edited and round_trip (the source decoded from its latents), (F, h, w, 3).
    reference: the edited first frame, (H', W', 3); it is scaled to the source's size and registered. mask: (F or 1, H', W') in 0..1, 1
    where the edit may act; elsewhere the source comes back exactly. anchor: off, on, or auto: on where the reference or a keyframe shows an
    edit; it is learned from all that do. Warns of an empty mask. Raises UserError for shapes and lengths that do not fit, and for values that are not finite.
    """
    check_options(len(edited), reference, mask, anchor, num_keyframes=len(keyframes))
    _check_pair(edited, round_trip)
    yield from deliver_stream(frames, list(zip(edited, round_trip)), len(edited), reference, mask, anchor=anchor, keyframes=keyframes)


def deliver_stream(
    frames: Iterable[Tensor],
    pairs: Iterable[tuple[Tensor, Tensor]],
    num_frames: int,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    anchor: str = "auto",
    keyframes: Sequence[EditedFrame] = (),
) -> Iterator[Tensor]:
    """As `deliver`, with edit and round trip frame by frame: pairs of (h, w, 3) each, `num_frames` of them at least.

    At most `LARGEST_WINDOW` pairs are held. An anchor with keyframes is learned before the first frame is delivered, so `pairs` is then
    iterated over twice, the first time up to the last keyframe.
    """
    check_options(num_frames, reference, mask, anchor, num_keyframes=len(keyframes))
    if mask is not None and not (mask > 0).any():
        warnings.warn("the mask is empty: the source comes back unchanged", stacklevel=2)
    further = _neighbourhoods(pairs, num_frames, [keyframe.number for keyframe in keyframes]) if keyframes and anchor != "off" else []
    window = PairWindow(pairs, num_frames)
    fitted: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(())
    correction, weight, count = None, None, 0
    for index, frame in enumerate(frames):
        if index >= num_frames:
            raise UserError("the source is longer than its edit", got=f"more than {num_frames} frames", expected=num_frames)
        if not frame.isfinite().all():
            raise UserError("NaN or infinite pixels", where="source", got=f"frame {index}", expected="finite values in 0..1")
        if index == 0:
            if anchor != "off":
                known = [] if reference is None else [(EditedFrame(0, frame, reference), window.around(0))]
                correction = _correction([*known, *zip(keyframes, further)], always=anchor == "on")
            fitted = _maps(window, frame.device)
        maps, edited, round_trip = next(fitted)
        small = round_trip.to(frame), edited.to(frame)
        delivered = apply_color_map(maps, frame, small[1])
        if correction is not None:
            delivered = apply_anchor(correction, frame, delivered, *small)
        if mask is not None:
            if weight is None or len(mask) > 1:  # a still mask is feathered once
                weight = feathered(mask[index % len(mask)].to(frame), frame.shape[:2])[..., None]
            delivered = torch.lerp(frame, delivered, weight)
        yield delivered
        count += 1
    if count < num_frames:
        raise UserError("the source is shorter than its edit", got=f"{count} frames", expected=num_frames)


class PairWindow:
    """The pairs of edited frame and round trip that are at hand: those of a stream from the first one still needed to the furthest one seen."""

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], num_frames: int):
        self.pairs, self.num_frames = iter(pairs), num_frames
        self.first = 0  # number of the first pair at hand
        self.at_hand: deque[tuple[Tensor, Tensor]] = deque()
        self.changes: list[float] = []  # of the round trip, from each frame to the next one

    def read_to(self, stop: int) -> None:
        """Reads the pairs before `stop`. Raises UserError for values that are not finite."""
        for number in range(self.first + len(self.at_hand), min(stop, self.num_frames)):
            pair = next(self.pairs)
            for what, values in zip(("edited", "round_trip"), pair):
                if not values.isfinite().all():
                    raise UserError("NaN or infinite values", where=what, got=f"frame {number}", expected="finite values in 0..1")
            if number:
                self.changes.append(_change(self.at_hand[-1][1], pair[1]))
            self.at_hand.append(pair)

    def advance(self, first: int) -> None:
        """Lets go of the pairs before `first`; the last one at hand stays, which the next one is compared with."""
        while self.first < first:
            self.read_to(self.first + 2)
            self.at_hand.popleft()
            self.first += 1

    def span(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The pairs from `first` to `last` - 1, which are at hand or ahead -> edited and round trip, (n, h, w, 3) each."""
        self.read_to(last)
        edited, round_trip = zip(*(self.at_hand[number - self.first] for number in range(first, last)))
        return torch.stack(edited), torch.stack(round_trip)

    def next_shot(self, first: int, last: int) -> int:
        """The first frame from `first` to `last` - 1 that begins a shot; `last`, or the clip's end, if none does."""
        last = min(last, self.num_frames)
        self.read_to(last + BESIDE)
        return next((number for number in range(first, last) if _is_cut(self.changes, number - 1)), last)

    def around(self, number: int) -> tuple[int, Tensor, Tensor]:
        """The frames of its shot that a frame's map depends on -> the frame's place among them, edited and round trip."""
        high = self.next_shot(number + 1, number + HALO + 1)
        low = next((start for start in range(number, max(number - HALO, 0), -1) if _is_cut(self.changes, start - 1)), max(number - HALO, 0))
        return number - low, *self.span(low, high)


def check_options(num_frames: int, reference: Tensor | None, mask: Tensor | None, anchor: str, *, num_keyframes: int = 0) -> None:
    """Raises UserError for options that cannot be followed; num_frames: of the edit. To be called before costly work; deliver does it too."""
    if anchor not in ANCHORS:
        raise UserError("unknown anchor", where="anchor", got=repr(anchor), expected=" or ".join(ANCHORS))
    if anchor == "on" and reference is None and not num_keyframes:
        raise UserError("an anchor needs a reference", where="anchor", got="none", fix="give the edited first frame, or set anchor to auto")
    if mask is not None and (mask.ndim != 3 or len(mask) not in (1, num_frames)):
        raise UserError("the mask does not fit the clip", where="mask", got=f"shape {tuple(mask.shape)}", expected=f"1 or {num_frames} masks (H, W)")
    for what, values in (("reference", reference), ("mask", mask)):
        if values is not None and not values.isfinite().all():
            raise UserError("NaN or infinite values", where=what, expected="finite values in 0..1")


def find_shots(frames: Tensor) -> list[int]:
    """(F, h, w, 3) -> the first frame of every shot, 0 among them: cuts change the picture at once, by far more than its neighbours do."""
    changes = [_change(a, b) for a, b in pairwise(frames)]
    return [0, *(index + 1 for index in range(len(changes)) if _is_cut(changes, index))]


def _change(frame: Tensor, following: Tensor) -> float:
    return (following.float() - frame.float()).abs().mean().item()


def _is_cut(changes: Sequence[float], index: int) -> bool:
    """Whether a shot begins after frame `index`; `changes` reach BESIDE further, or to the clip's end."""
    beside = [*changes[max(0, index - BESIDE) : index], *changes[index + 1 : index + 1 + BESIDE]]
    return changes[index] > CUT and (not beside or changes[index] > CUT_RATIO * median_low(beside))


def detailed_last_frame(source: Tensor, edited: Tensor, round_trip: Tensor) -> Tensor:
    """Frames of one shot, (F, h, w, 3) each -> the last edited frame with the source's detail, (h, w, 3)."""
    maps = fit_color_maps(*(x[-1 - HALO :].float() for x in (edited, round_trip)))[-1]
    return apply_color_map(maps, source[-1].to(maps), edited[-1].to(maps))


def feathered(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(H', W') in 0..1 -> (H, W): exactly 0 outside of the mask, rising to 1 inside of its border."""
    mask = F.interpolate(mask[None, None].float(), size, mode="bilinear", align_corners=False)
    radius = max(1, round(min(size) * FEATHER))
    inside = 1 - F.max_pool2d(1 - mask, 2 * radius + 1, 1, radius)  # eroded
    soft = F.avg_pool2d(inside, 2 * radius + 1, 1, radius, count_include_pad=False)
    return torch.where(mask > 0, soft, torch.zeros_like(soft))[0, 0]


def _maps(window: PairWindow, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each frame's maps, edit and round trip. The maps are fitted in chunks that equal one fit of a whole shot."""
    start = first = 0
    while first < window.num_frames:
        window.read_to(first + 1)
        length = min(CHUNK, max(1, CHUNK_PIXELS // window.at_hand[0][0][:, :, 0].numel()))
        stop = window.next_shot(first + 1, first + length + HALO)
        last, low = min(first + length, stop), max(first - HALO, start)
        edited, round_trip = (x.to(device, torch.float32) for x in window.span(low, min(last + HALO, stop)))
        maps = fit_color_maps(edited, round_trip)
        yield from zip(maps[first - low : last - low], edited[first - low : last - low], round_trip[first - low : last - low])
        if last == stop:
            start = stop
        first = last
        window.advance(max(first - HALO, start))


def _neighbourhoods(pairs: Iterable[tuple[Tensor, Tensor]], num_frames: int, numbers: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
    """What PairWindow.around returns for each of these frames, read in order."""
    window, found = PairWindow(pairs, num_frames), {}
    for number in sorted(set(numbers)):
        window.advance(max(number - HALO, 0))
        found[number] = window.around(number)
    return [found[number] for number in numbers]


def _correction(known: Sequence[tuple[EditedFrame, tuple[int, Tensor, Tensor]]], always: bool) -> Anchor | None:
    """The anchor learned from the edited frames, each with PairWindow.around; none where no one shows an edit, unless `always`.

    A frame whose edit the words alone asked for is left out.
    """
    examples, noises, is_shown = [], [], False
    for example, (place, edited, round_trip) in known:
        frame, small = example.source, (round_trip[place].to(example.source), edited[place].to(example.source))
        maps = fit_color_maps(*(x.to(frame) for x in (edited, round_trip)))[place]
        detailed = apply_color_map(maps, frame, small[1])
        fitted = resize_and_crop(example.image[None].to(frame), (frame.shape[1], frame.shape[0]))[0]
        truth, noise = restore(register(fitted, frame, detailed), frame, detailed, maps, small[0])
        if always or not lacks_edit(truth, frame, *small):
            examples.append((frame, detailed, truth, *small))
            noises.append(noise)
            is_shown = is_shown or shows_edit(truth, frame)
    if not examples or not (always or is_shown):
        return None
    frames, detailed, truths, round_trips, edits = (torch.cat(column) for column in zip(*examples))  # one below the other
    return fit_anchor(frames, detailed, truths, round_trips, edits, sum(noises) / len(noises))


def _check_pair(edited: Tensor, round_trip: Tensor) -> None:
    if edited.ndim != 4 or edited.shape != round_trip.shape or not len(edited):
        raise UserError(
            "the edit and the source's round trip differ", got=f"{tuple(edited.shape)} and {tuple(round_trip.shape)}", expected="(F, h, w, 3) twice"
        )
