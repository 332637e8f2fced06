"""Whether the edited thing has its colour, its place and its shape: told from the colour that the truth gives it.

F frames, H x W pixels; lengths are in shares of the frame's shorter side, colours in RGB distance (sqrt(3) at most).
A thing is what has its colour inside the edited region, in truth and result alike, so texture and blur count against neither.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEAR = 0.35  # a thing's texture strays no further from its colour
MARGIN = 2  # pixels around the mask in which a thing may still lie
LEAST_AREA = 0.004  # of a frame, from which a thing is there
OFF_COLOUR = 0.15  # the bounds of what counts as right
OFF_PLACE = 0.05
LIKE_SHAPE = 0.75
LEFT_OVER = 0.15
NO_COLOUR = 10.0  # stands for what is not finite, far from any colour
GONE = 0.1  # of the source's pixels in the thing's colour: where the truth keeps fewer, it is removed


@dataclass(frozen=True)
class Likeness:
    """How near a result is to the truth; None where the edit has no such side. Place and shape are means over frames."""

    colour: float | None  # between the mean colours
    place: float | None = None  # between the centres
    shape: float | None = None  # intersection over union
    left: float | None = None  # of a removed thing's pixels, the share that still has its colour

    @property
    def right(self) -> bool:
        """Within all bounds."""
        bounds = ((self.colour, OFF_COLOUR), (self.place, OFF_PLACE), (self.left, LEFT_OVER))
        return all(value is None or value <= bound for value, bound in bounds) and (self.shape is None or self.shape >= LIKE_SHAPE)


def likeness(edited: Tensor, source: Tensor, target: Tensor, mask: Tensor, colour: tuple[float, float, float] | None) -> Likeness:
    """(F, H, W, 3) thrice in 0..1, mask (F, H, W) bool, the thing's colour after the edit, or before it where it is removed.

    Without a colour (a look, a background) only the region's mean colour is compared.
    """
    edited = edited.nan_to_num(nan=NO_COLOUR, posinf=NO_COLOUR, neginf=-NO_COLOUR)
    if colour is None:
        return Likeness((mean_colour(edited, mask) - mean_colour(target, mask)).norm().item())
    region = F.max_pool2d(mask[:, None].float(), 2 * MARGIN + 1, stride=1, padding=MARGIN)[:, 0] > 0
    found, before, truth = (find(frames, colour, region) for frames in (edited, source, target))
    if truth.sum() < GONE * before.sum():
        gone = before & ~truth
        return Likeness(None, left=(found & gone).sum().item() / gone.sum().item())
    least = LEAST_AREA * truth[0].numel()
    there = truth.flatten(1).sum(1) >= least
    if not there.any():
        return Likeness(None)
    either = (found | truth).flatten(1).sum(1)
    overlap = (found & truth).flatten(1).sum(1) / either.clamp(min=1)
    both = there & found.flatten(1).any(1)
    if not both.any():
        return Likeness(NO_COLOUR, 1.0, 0.0)
    distance = (centres(found) - centres(truth)).norm(dim=1) / min(truth.shape[1:])
    return Likeness(
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
