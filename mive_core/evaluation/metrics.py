"""Measures of an edited clip against its ground truth. F frames, H x W pixels; PSNR in dB with a peak of 1."""

import math
from collections.abc import Sequence

from torch import Tensor, ones_like

PSNR_CAP = 100.0
FIGURES = ("psnr_edited", "psnr_kept", "psnr")  # inside the mask, outside of it, over whole frames
VISIBLE = 0.15  # RGB distance (sqrt(3) at most) from which a pixel counts as changed by the edit
MIN_CHANGED = 0.01  # of a frame's pixels; frames with fewer changed pixels are ignored
UNEDITED_TOLERANCE = 1 / 255  # of a reference that equals the source's first frame


def psnr(frames: Tensor, target: Tensor, region: Tensor) -> float | None:
    """frames, target (F, H, W, 3) in 0..1, region (F, H, W) bool -> dB, at most PSNR_CAP; None if the region is empty or not finite."""
    if not region.any():
        return None
    error = (frames - target)[region].double().square().mean().item()
    if not math.isfinite(error):
        return None
    return min(PSNR_CAP, -10 * math.log10(error)) if error else PSNR_CAP


def region_psnr(frames: Tensor, target: Tensor, mask: Tensor) -> dict[str, float | None]:
    """frames, target (F, H, W, 3), mask (F, H, W) bool -> PSNR inside the mask, outside and over everything; None for an empty region."""
    return dict(zip(FIGURES, (psnr(frames, target, region) for region in (mask, ~mask, ones_like(mask)))))


def psnr_by_frame(frames: Tensor, target: Tensor, mask: Tensor) -> list[float | None]:
    """PSNR inside the mask of each frame; None for frames of which it covers less than MIN_CHANGED."""
    return [psnr(frames[i], target[i], mask[i]) if mask[i].float().mean() >= MIN_CHANGED else None for i in range(len(frames))]


def worst_frame(frames: Tensor, ceiling: Tensor, target: Tensor, mask: Tensor) -> dict[str, float | None]:
    """Figures of the worst frame inside the mask: of the frames, of the VAE's ceiling, and how far a frame lies below its own ceiling at most."""
    edited, best = psnr_by_frame(frames, target, mask), psnr_by_frame(ceiling, target, mask)
    gaps = [limit - value for value, limit in zip(edited, best) if value is not None and limit is not None]
    worst, worst_ceiling = (min((value for value in values if value is not None), default=None) for values in (edited, best))
    return {"psnr_worst_frame": worst, "psnr_worst_frame_ceiling": worst_ceiling, "worst_frame_gap": max(gaps, default=None)}


def first_frame_gap(first: Tensor, target: Tensor, round_trip: Tensor) -> float | None:
    """Edited first frame, the target's, and the reference after the VAE, (H, W, 3) each -> dB that the edited one lies below the latter."""
    everywhere = ones_like(first[..., 0], dtype=bool)
    edited, reference = psnr(first, target, everywhere), psnr(round_trip, target, everywhere)
    return None if edited is None or reference is None else reference - edited


def shows_edit(reference: Tensor, source: Tensor) -> bool:
    """Whether a reference (H, W, 3) differs from the source's first frame; source (F, H, W, 3)."""
    return bool((reference - source[0]).abs().max() > UNEDITED_TOLERANCE)


def edit_completion(frames: Tensor, source: Tensor, target: Tensor) -> float | None:
    """frames, source, target (F, H, W, 3) -> the share of visibly changed pixels that are edited, in the worst frame.

    A pixel changes visibly if source and target differ by more than VISIBLE; it is edited if it lies nearer to the target than half the
    distance between source and target. None if the edit changes next to nothing.
    """
    change, error = ((target - other).norm(dim=-1).flatten(1) for other in (source, frames))
    changed = change > VISIBLE
    counts = changed.sum(dim=1)
    counted = counts >= MIN_CHANGED * changed.shape[1]
    if not counted.any():
        return None
    return (((error < change / 2) & changed).sum(dim=1)[counted] / counts[counted]).min().item()


def is_nearest(frames: Tensor, target: Tensor | None, others: Sequence[Tensor | None]) -> bool | None:
    """Whether frames are nearer to the target than to all others, (F, H, W, 3) each; None without one of them."""
    targets = [target, *others]
    errors = [(frames - known).square().mean().item() for known in targets if known is not None]
    return errors[0] < min(errors[1:]) if len(errors) == len(targets) else None


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None without any."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
