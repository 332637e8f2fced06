"""Delivery: an edit made at the model's size becomes frames of the source's size, with the source's detail and the reference's colours.

Frames come one by one and go one by one, so memory does not grow with the source's size times its length.

F frames; h x w pixels of the edit, H x W of the source.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
    if mask is not None and not (mask > 0).any():
        warnings.warn("the mask is empty: the source comes back unchanged", stacklevel=2)
    fitted: Iterator[Tensor] = iter(())
    shots, correction, weight, count = find_shots(round_trip), None, None, 0
    for index, frame in enumerate(frames):
        if index >= len(edited):
            raise UserError("the source is longer than its edit", got=f"more than {len(edited)} frames", expected=len(edited))
        if not frame.isfinite().all():
            raise UserError("NaN or infinite pixels", where="source", got=f"frame {index}", expected="finite values in 0..1")
        if index in shots:
            stop = min((start for start in shots if start > index), default=len(edited))
            fitted = _maps(edited, round_trip, index, stop, frame.device)
        maps, small = next(fitted), (round_trip[index].to(frame), edited[index].to(frame))
        delivered = apply_color_map(maps, frame, small[1])
        if index == 0 and anchor != "off":
            known = [] if reference is None else [EditedFrame(0, frame, reference)]
            correction = _correction([*known, *keyframes], edited, round_trip, shots, always=anchor == "on")
        if correction is not None:
            delivered = apply_anchor(correction, frame, delivered, *small)
        if mask is not None:
            if weight is None or len(mask) > 1:  # a still mask is feathered once
                weight = feathered(mask[index % len(mask)].to(frame), frame.shape[:2])[..., None]
            delivered = torch.lerp(frame, delivered, weight)
        yield delivered
        count += 1
    if count < len(edited):
        raise UserError("the source is shorter than its edit", got=f"{count} frames", expected=len(edited))


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
    change = torch.tensor([(a.float() - b.float()).abs().mean().item() for a, b in zip(frames[1:], frames[:-1])])
    starts = [0]
    for index, value in enumerate(change):
        beside = torch.cat([change[max(0, index - 3) : index], change[index + 1 : index + 4]])
        if value > CUT and (not len(beside) or value > CUT_RATIO * beside.median()):
            starts.append(index + 1)
    return starts


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


def _maps(edited: Tensor, round_trip: Tensor, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
    """Each frame's maps of the shot from `start` to `stop`, fitted in chunks that equal one fit of the whole shot."""
    length = min(CHUNK, max(1, CHUNK_PIXELS // edited[0, :, :, 0].numel()))
    for first in range(start, stop, length):
        last = min(first + length, stop)
        low, high = max(first - HALO, start), min(last + HALO, stop)
        maps = fit_color_maps(edited[low:high].to(device, torch.float32), round_trip[low:high].to(device, torch.float32))
        yield from maps[first - low : last - low]


def _correction(known: Sequence[EditedFrame], edited: Tensor, round_trip: Tensor, shots: list[int], always: bool) -> Anchor | None:
    """The anchor learned from the edited frames; none where no one shows an edit, unless `always`.

    A frame whose edit the words alone asked for is left out.
    """
    examples, noises, is_shown = [], [], False
    for example in known:
        frame, small = example.source, (round_trip[example.number].to(example.source), edited[example.number].to(example.source))
        start = max(shot for shot in shots if shot <= example.number)
        stop = min((shot for shot in shots if shot > example.number), default=len(edited))
        low, high = max(example.number - HALO, start), min(example.number + HALO + 1, stop)
        maps = fit_color_maps(*(x[low:high].to(frame) for x in (edited, round_trip)))[example.number - low]
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
    for what, values in (("edited", edited), ("round_trip", round_trip)):
        if not values.isfinite().all():
            raise UserError("NaN or infinite values", where=what, expected="finite values in 0..1")
