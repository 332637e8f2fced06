"""Whether the edited thing has its colour, its place and its shape: told from the colour that the truth gives it.

F frames, H x W pixels; lengths are in shares of the frame's shorter side, colours in RGB distance (sqrt(3) at most).
A thing is what has its colour inside the edited region, in truth and result object_match, so texture and blur count against neither.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 0.35  # a thing's texture strays no further from its colour
MARGIN = 2  # pixels around the mask in which a thing may still lie
MIN_AREA = 0.004  # of a frame, from which a thing is there
MAX_COLOUR_DISTANCE = 0.15  # the bounds of what counts as right
MAX_CENTRE_DISTANCE = 0.05
MIN_IOU = 0.75
MAX_REMAINING = 0.15
NO_COLOUR = 10.0  # stands for what is not finite, far from any colour
GONE = 0.1  # of the source's pixels in the thing's colour: where the truth keeps fewer, it is removed


@dataclass(frozen=True)
class ObjectMatch:
    """How near a result is to the truth; None where the edit has no such side. Place and shape are means over frames."""

    colour_distance: float | None  # between the mean colours
    centre_distance: float | None = None  # between the centres
    iou: float | None = None  # intersection over union
    remaining: float | None = None  # share of a removed object's pixels that still have its colour

    @property
    def matches(self) -> bool:
        """Within all bounds."""
        bounds = ((self.colour_distance, MAX_COLOUR_DISTANCE), (self.centre_distance, MAX_CENTRE_DISTANCE), (self.remaining, MAX_REMAINING))
        return all(value is None or value <= bound for value, bound in bounds) and (self.iou is None or self.iou >= MIN_IOU)


def match_object(edited: Tensor, source: Tensor, target: Tensor, mask: Tensor, colour: tuple[float, float, float] | None) -> ObjectMatch:
    """(F, H, W, 3) thrice in 0..1, mask (F, H, W) bool, the thing's colour after the edit, or before it where it is removed.

    Without a colour (a look, a background) only the region's mean colour is compared.
    """
    edited = edited.nan_to_num(nan=NO_COLOUR, posinf=NO_COLOUR, neginf=-NO_COLOUR)
    if colour is None:
        return ObjectMatch((mean_colour(edited, mask) - mean_colour(target, mask)).norm().item())
    region = F.max_pool2d(mask[:, None].float(), 2 * MARGIN + 1, stride=1, padding=MARGIN)[:, 0] > 0
    found, before, truth = (find(frames, colour, region) for frames in (edited, source, target))
    if truth.sum() < GONE * before.sum():
        gone = before & ~truth
        return ObjectMatch(None, remaining=(found & gone).sum().item() / gone.sum().item())
    least = MIN_AREA * truth[0].numel()
    there = truth.flatten(1).sum(1) >= least
    if not there.any():
        return ObjectMatch(None)
    either = (found | truth).flatten(1).sum(1)
    overlap = (found & truth).flatten(1).sum(1) / either.clamp(min=1)
    both = there & found.flatten(1).any(1)
    if not both.any():
        return ObjectMatch(NO_COLOUR, 1.0, 0.0)
    distance = (centres(found) - centres(truth)).norm(dim=1) / min(truth.shape[1:])
    return ObjectMatch(
        (mean_colour(edited, found) - mean_colour(target, truth)).norm().item(), distance[both].mean().item(), overlap[either >= least].mean().item()
    )


def find(frames: Tensor, colour: tuple[float, float, float], region: Tensor) -> Tensor:
    """(F, H, W, 3), (F, H, W) bool -> (F, H, W) bool."""
    return ((frames - torch.tensor(colour)).norm(dim=-1) < NEAR) & region


def mean_colour(frames: Tensor, region: Tensor) -> Tensor:
    """(F, H, W, 3), (F, H, W) bool -> (3,) over the whole clip."""
    return frames[region].mean(dim=0) if region.any() else frames.new_zeros(3)


def centres(things: Tensor) -> Tensor:
    """(F, H, W) bool -> (F, 2) mean row and column of each frame's pixels."""
    weight = things.float()
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in things.shape[1:])
    total = weight.sum(dim=(1, 2)).clamp(min=1)
    return torch.stack([weight.sum(dim=2) @ rows / total, weight.sum(dim=1) @ columns / total], dim=1)
