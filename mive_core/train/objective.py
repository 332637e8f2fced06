"""What the DiT learns from: a paired edit as frozen models see it, and the loss on its target frames (paper, training).

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dit import MiVEDiT
from ..flow import FlowSample, flow_path

TIME_PARTS = 5  # of 0..1, whose errors are told apart


@dataclass(frozen=True)
class EditFeatures:
    """One paired edit as the DiT sees it."""

    target: Tensor  # (C, T, Y, X)
    source: Tensor  # (C, T, Y, X)
    reference: Tensor  # (C, 1, Y, X)
    states: Tensor  # (K, S, D_vlm)
    mask: Tensor  # (T, Y, X) 1 where the edit acts
    negative: Tensor | None = None  # (K, S', D_vlm) of an empty instruction
    track: Tensor | None = None  # (T, 3) x, y and radius of the edited thing, in latent cells; see embedded/auxiliary_heads.py
    shape: Tensor | None = None  # () its index in SHAPES after the edit, -1 where there is no single thing
    cover: Tensor | None = None  # (T, 2Y, 2X) in 0..1, how much of it shows in the target

    def to(self, device: torch.device | str) -> "EditFeatures":
        return EditFeatures(**{f.name: value if (value := getattr(self, f.name)) is None else value.to(device) for f in fields(self)})


def stacked(entries: Sequence[EditFeatures]) -> EditFeatures:
    """Entries of one shape -> a batch in float32, each field with B before."""
    columns = {f.name: [getattr(entry, f.name) for entry in entries] for f in fields(EditFeatures)}
    return EditFeatures(**{name: None if any(value is None for value in column) else torch.stack(column).float() for name, column in columns.items()})


def latent_mask(mask: Tensor) -> Tensor:
    """(F, H, W) bool -> (T, Y, X) float: 1 where any pixel of the latent cell is edited; frame 0 is a latent frame of its own."""
    first = F.max_pool3d(mask[None, :1].float(), (1, 8, 8))
    rest = F.max_pool3d(mask[None, 1:].float(), (4, 8, 8)) if len(mask) > 1 else first[:, :0]
    return torch.cat([first, rest], dim=1)[0]


def flow_matching_losses(
    model: MiVEDiT,
    batch: EditFeatures,
    states: Tensor,
    noise: Tensor,
    t: Tensor,
    edited_weight: float,
    channels: Tensor | float = 1.0,
    drafts: Tensor | None = None,
    cauchy_scale: float = 0.0,
) -> dict[str, Tensor]:
    """Weighted squared error of the velocity (loss), the unweighted one inside and outside the mask (edited, kept), and by t.

    noise (B, C, T, Y, X), t (B,); `channels` (C,) or one number weighs latent channels. `drafts` (n, C, T, Y, X) take the place of the
    first n targets in x_t; an error there is that of the target which the velocity leads to, t times the velocity's own.
    With a `cauchy_scale` the loss is cauchy_loss instead.
    """
    path, reach = flow_path(batch.target, noise, t), torch.ones_like(t)
    if drafts is not None:
        n = len(drafts)
        path = from_predictions(path, drafts, batch.target[:n], noise[:n])
        reach[:n] = t[:n]
    velocity = model(path.x_t, batch.source, batch.reference, model.embed_condition(states), t)
    error = reach.view(-1, 1, 1, 1).square() * (torch.as_tensor(channels).view(-1, 1, 1, 1) * (velocity - path.velocity).square()).mean(dim=1)
    if cauchy_scale:
        loss = cauchy_loss(batch.mask, error, edited_weight, cauchy_scale)
    else:
        weight = 1 + (edited_weight - 1) * batch.mask
        loss = (weight * error).sum() / weight.sum()
    return {
        "loss": loss,
        "edited": mean_where(batch.mask, error),
        "kept": mean_where(1 - batch.mask, error),
        **by_time(error.detach().flatten(1).mean(dim=1), t),
    }


def cauchy_loss(mask: Tensor, error: Tensor, edited_weight: float, floor: float) -> Tensor:
    """Mean over clips and their regions of floor * log(1 + e / floor), e being a region's mean error.

    A region is what lies under the mask, which counts `edited_weight`, or outside it, which counts 1; mask and error (B, T, Y, X).
    Ours: so a mean of PSNRs counts errors, which is what edits are measured by. Clips and regions count alike, however large, and one
    that is nearly right counts as much as one that is far off; far below the floor e counts as it is.
    """
    regions = torch.stack([mask, 1 - mask]).flatten(2)
    means = mean_where(regions, error.flatten(1), dim=2)  # (2, B)
    weight = regions.any(dim=2) * means.new_tensor([[edited_weight], [1.0]])
    return (floor * weight * torch.log1p(means / floor)).sum() / weight.sum()


def from_predictions(path: FlowSample, drafts: Tensor, target: Tensor, noise: Tensor) -> FlowSample:
    """The first n entries lie between noise and a draft, as in sampling, and their velocity leads to the target all the same."""
    n = len(drafts)
    x_t = flow_path(drafts, noise, path.t[:n]).x_t
    velocity = (x_t - target) / path.t[:n].view(-1, 1, 1, 1, 1)
    return FlowSample(torch.cat([x_t, path.x_t[n:]]), torch.cat([velocity, path.velocity[n:]]), path.t)


@torch.no_grad()
def one_step_prediction(model: MiVEDiT, batch: EditFeatures, states: Tensor, noise: Tensor) -> Tensor:
    """Noise (n, C, T, Y, X) -> what one step of sampling makes of it, for the first n entries."""
    n = len(noise)
    return noise - model(noise, batch.source[:n], batch.reference[:n], model.embed_condition(states[:n]), noise.new_ones(n)).float()


def mean_where(weight: Tensor, value: Tensor, dim: int | None = None) -> Tensor:
    """Weighted mean, of all or along one dimension; 0 where nothing has a weight."""
    return (weight * value).sum(dim) / weight.sum(dim).clamp(min=1)


def by_time(errors: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Errors of samples and their t, (B,) each -> by part of 0..1 the sum and how many there are, (2,)."""
    part = (t * TIME_PARTS).long().clamp(max=TIME_PARTS - 1)
    pairs = torch.zeros(TIME_PARTS, 2, device=t.device).index_add_(0, part, torch.stack([errors.float(), torch.ones_like(t)], dim=1))
    return {f"loss_t{i / TIME_PARTS:.1f}-{(i + 1) / TIME_PARTS:.1f}": pair for i, pair in enumerate(pairs)}
