"""The training objective of the DiT (paper, training): flow matching on the target's latents, and the features it needs.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dit import MiVEDiT
from ..flow import FlowSample, flow_path
from ..reference import fix_first_frame, latent_times

TIME_BINS = 5  # equal parts of 0..1 for which errors are logged separately


@dataclass(frozen=True)
class EditFeatures:
    """One paired edit as the DiT sees it; a batch has B in front of every shape."""

    target: Tensor  # (C, T, Y, X)
    source: Tensor  # (C, T, Y, X)
    reference: Tensor  # (C, R, Y, X): the edited first frame, and keyframes
    states: Tensor  # (K, S, D_vlm)
    mask: Tensor  # (T, Y, X) 1 inside the edited region
    negative: Tensor | None = None  # (K, S', D_vlm) states of an empty instruction
    reference_frames: Tensor | None = None  # (R,) pixel frame of each reference; None: the first frame alone
    track: Tensor | None = None  # (T, 3) x, y and radius of the edited object, in latent cells; see embedded/auxiliary_heads.py
    shape: Tensor | None = None  # () index in SHAPES of the object's shape after the edit; -1 if there is no single object
    cover: Tensor | None = None  # (T, 2Y, 2X) in 0..1, visible coverage by the object in the target

    def to(self, device: torch.device | str) -> "EditFeatures":
        return EditFeatures(**{f.name: value if (value := getattr(self, f.name)) is None else value.to(device) for f in fields(self)})


def collate(entries: Sequence[EditFeatures]) -> EditFeatures:
    """Stacks entries of one shape into a batch in float32; a field that any entry lacks is None."""
    columns = {f.name: [getattr(entry, f.name) for entry in entries] for f in fields(EditFeatures)}
    return EditFeatures(**{name: None if any(value is None for value in column) else torch.stack(column).float() for name, column in columns.items()})


def latent_mask(mask: Tensor) -> Tensor:
    """(F, H, W) bool -> (T, Y, X) float: 1 if any pixel of the latent cell is edited; pixel frame 0 has a latent frame of its own."""
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
    channel_weights: Tensor | float = 1.0,
    predictions: Tensor | None = None,
    cauchy_scale: float = 0.0,
) -> dict[str, Tensor]:
    """Returns `loss`, the weighted squared error of the velocity, its unweighted parts inside and outside the mask (`edited`, `kept`), and by t.

    noise (B, C, T, Y, X), t (B,); `channel_weights` (C,) or one number. With scheduled sampling, `predictions` (n, C, T, Y, X) replace
    the first n targets in x_t; for these entries the error is that of the implied x_0, which is t times that of the velocity.
    With a `cauchy_scale` above 0, `loss` is cauchy_loss instead.
    """
    path, error_scale = flow_path(batch.target, noise, t), torch.ones_like(t)
    if predictions is not None:
        n = len(predictions)
        path = from_predictions(path, predictions, batch.target[:n], noise[:n])
        error_scale[:n] = t[:n]
    return velocity_losses(model, batch, states, path, edited_weight, channel_weights, error_scale, cauchy_scale)


def velocity_losses(
    model: MiVEDiT,
    batch: EditFeatures,
    states: Tensor,
    path: FlowSample,
    edited_weight: float,
    channel_weights: Tensor | float = 1.0,
    error_scale: Tensor | float = 1.0,
    cauchy_scale: float = 0.0,
) -> dict[str, Tensor]:
    """The losses of `flow_matching_losses` for the model's velocity at a point, against the path's; `error_scale`, (B,) or one number, is a factor of it."""
    velocity = model(path.x_t, batch.source, batch.reference, model.embed_condition(states), path.t, reference_times(batch))
    error_scale = torch.as_tensor(error_scale, device=path.t.device).expand(len(path.t))
    error = error_scale.view(-1, 1, 1, 1).square() * (torch.as_tensor(channel_weights).view(-1, 1, 1, 1) * (velocity - path.velocity).square()).mean(dim=1)
    if cauchy_scale:
        loss = cauchy_loss(batch.mask, error, edited_weight, cauchy_scale)
    else:
        weight = 1 + (edited_weight - 1) * batch.mask
        loss = (weight * error).sum() / weight.sum()
    return {
        "loss": loss,
        "edited": masked_mean(batch.mask, error),
        "kept": masked_mean(1 - batch.mask, error),
        **loss_by_time(error.detach().flatten(1).mean(dim=1), path.t),
    }


def cauchy_loss(mask: Tensor, error: Tensor, edited_weight: float, scale: float) -> Tensor:
    """(ours) Cauchy (Lorentzian) loss: weighted mean over clips and regions of scale * log(1 + e / scale), where e is a region's mean squared error.

    Each clip has two regions: inside the mask, with weight `edited_weight`, and outside it, with weight 1; mask and error (B, T, Y, X).
    The logarithm matches the evaluation, which averages PSNRs: halving an error well above `scale` gains the same at any size. Regions
    count equally, whatever their number of cells. For e far below `scale` the loss is e itself.
    """
    regions = torch.stack([mask, 1 - mask]).flatten(2)
    means = masked_mean(regions, error.flatten(1), dim=2)  # (2, B)
    weight = regions.any(dim=2) * means.new_tensor([[edited_weight], [1.0]])
    return (scale * weight * torch.log1p(means / scale)).sum() / weight.sum()


def from_predictions(path: FlowSample, predictions: Tensor, target: Tensor, noise: Tensor) -> FlowSample:
    """Scheduled sampling: moves the first n points of the path between noise and a prediction of x_0, with velocities that still lead to the target."""
    n = len(predictions)
    x_t = flow_path(predictions, noise, path.t[:n]).x_t
    velocity = (x_t - target) / path.t[:n].view(-1, 1, 1, 1, 1)
    return FlowSample(torch.cat([x_t, path.x_t[n:]]), torch.cat([velocity, path.velocity[n:]]), path.t)


@torch.no_grad()
def one_step_prediction(model: MiVEDiT, batch: EditFeatures, states: Tensor, noise: Tensor) -> Tensor:
    """Predicts x_0 (n, C, T, Y, X) of the first n entries from noise of that shape, in one sampling step from t = 1."""
    n = len(noise)
    source, reference, times, t = batch.source[:n], batch.reference[:n], reference_times(batch), noise.new_ones(n)
    velocity = model(noise, source, reference, model.embed_condition(states[:n]), t, None if times is None else times[:n]).float()
    return noise - (fix_first_frame(velocity, noise, t, source, reference) if model.config.fix_first_frame else velocity)


def reference_times(batch: EditFeatures) -> Tensor | None:
    """Returns the latent times of a batch's references, (B, R); None: the first frame alone."""
    return None if batch.reference_frames is None else latent_times(batch.reference_frames)


def masked_mean(weight: Tensor, value: Tensor, dim: int | None = None) -> Tensor:
    """Returns the mean of `value` weighted by `weight`, over all elements or along `dim`; 0 if all weights are 0."""
    return (weight * value).sum(dim) / weight.sum(dim).clamp(min=1)


def loss_by_time(errors: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Errors (B,) and t (B,) -> for each of the TIME_BINS parts of 0..1 the sum of the errors and their count, (2,)."""
    bin_index = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    pairs = torch.zeros(TIME_BINS, 2, device=t.device).index_add_(0, bin_index, torch.stack([errors.float(), torch.ones_like(t)], dim=1))
    return {f"loss_t{i / TIME_BINS:.1f}-{(i + 1) / TIME_BINS:.1f}": pair for i, pair in enumerate(pairs)}
