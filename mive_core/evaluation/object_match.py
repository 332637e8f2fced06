"""Checks whether the edited object has the colour, position and shape that the ground truth gives it.

F frames, H x W pixels; lengths are fractions of the frame's shorter side, colours are compared by RGB distance (sqrt(3) at most).
The object consists of the pixels in its colour inside the edited region. Truth and result are segmented in the same way, so that
texture and blur do not count as errors.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLOUR_TOLERANCE = 0.35  # RGB distance from the object's colour that its texture may have
REGION_MARGIN = 2  # pixels around the mask that still belong to the edited region
MIN_AREA = 0.004  # of a frame; an object smaller than that counts as absent
MAX_COLOUR_DISTANCE = 0.15  # this and the next three: the bounds of a match
MAX_CENTRE_DISTANCE = 0.05
MIN_IOU = 0.75
MAX_REMAINING = 0.15
INVALID_COLOUR = 10.0  # replaces pixels that are not finite; far from any colour
REMOVED_BELOW = 0.1  # share of the source's object pixels; if the truth keeps fewer, the edit removes the object


@dataclass(frozen=True)
class ObjectMatch:
    """Distances between result and truth; None where a measure does not apply. Centre distance and IoU are means over frames."""

    colour_distance: float | None  # between the objects' mean colours
    centre_distance: float | None = None  # between the centres
    iou: float | None = None  # intersection over union
    remaining: float | None = None  # share of a removed object's pixels that still have its colour

    @property
    def matches(self) -> bool:
        """True if all measures are within their bounds."""
        bounds = ((self.colour_distance, MAX_COLOUR_DISTANCE), (self.centre_distance, MAX_CENTRE_DISTANCE), (self.remaining, MAX_REMAINING))
        return all(value is None or value <= bound for value, bound in bounds) and (self.iou is None or self.iou >= MIN_IOU)


def match_object(edited: Tensor, source: Tensor, target: Tensor, mask: Tensor, colour: tuple[float, float, float] | None) -> ObjectMatch | None:
    """edited, source, target (F, H, W, 3) in 0..1, mask (F, H, W) bool, the object's colour after the edit (before it, if removed) -> ObjectMatch.

    None where there is nothing to measure: without a colour (a change of look or background), or if the truth has nothing of it.
    """
    if colour is None:
        return None
    edited = _finite(edited)
    region = F.max_pool2d(mask[:, None].float(), 2 * REGION_MARGIN + 1, stride=1, padding=REGION_MARGIN)[:, 0] > 0
    found, before, truth = (segment_colour(frames, colour, region) for frames in (edited, source, target))
    if truth.sum() < REMOVED_BELOW * before.sum():
        removed = before & ~truth
        return ObjectMatch(None, remaining=(found & removed).sum().item() / removed.sum().item())
    min_pixels = MIN_AREA * truth[0].numel()
    present = truth.flatten(1).sum(1) >= min_pixels
    if not present.any():
        return None
    union = (found | truth).flatten(1).sum(1)
    iou = (found & truth).flatten(1).sum(1) / union.clamp(min=1)
    both = present & found.flatten(1).any(1)
    if not both.any():
        return ObjectMatch(INVALID_COLOUR, 1.0, 0.0)
    distance = (centroids(found) - centroids(truth)).norm(dim=1) / min(truth.shape[1:])
    return ObjectMatch(
        (mean_colour(edited, found) - mean_colour(target, truth)).norm().item(), distance[both].mean().item(), iou[union >= min_pixels].mean().item()
    )


def mean_colour_distance(edited: Tensor, target: Tensor, mask: Tensor) -> float | None:
    """edited, target (F, H, W, 3), mask (F, H, W) bool -> RGB distance of the mean colours inside the mask; None if it is empty."""
    return (mean_colour(_finite(edited), mask) - mean_colour(target, mask)).norm().item() if mask.any() else None


def segment_colour(frames: Tensor, colour: tuple[float, float, float], region: Tensor) -> Tensor:
    """(F, H, W, 3), region (F, H, W) bool -> the region's pixels near the colour, (F, H, W) bool."""
    return ((frames - torch.tensor(colour)).norm(dim=-1) < COLOUR_TOLERANCE) & region


def mean_colour(frames: Tensor, region: Tensor) -> Tensor:
    """(F, H, W, 3), region (F, H, W) bool -> (3,) mean over the whole clip."""
    return frames[region].mean(dim=0) if region.any() else frames.new_zeros(3)


def centroids(objects: Tensor) -> Tensor:
    """(F, H, W) bool -> (F, 2) mean row and column of each frame's pixels."""
    weight = objects.float()
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in objects.shape[1:])
    total = weight.sum(dim=(1, 2)).clamp(min=1)
    return torch.stack([weight.sum(dim=2) @ rows / total, weight.sum(dim=1) @ columns / total], dim=1)


def _finite(frames: Tensor) -> Tensor:
    return frames.nan_to_num(nan=INVALID_COLOUR, posinf=INVALID_COLOUR, neginf=-INVALID_COLOUR)
