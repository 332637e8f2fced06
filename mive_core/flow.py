"""Flow matching: the sign and time convention of training and sampling.

t = 0 is data, t = 1 is noise: x_t = (1 - t) x_0 + t e, velocity v = dx/dt = e - x_0.
Sampling integrates from t = 1 to 0: x <- x + (t_next - t) v.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class FlowSample:
    """A point on the path from data to noise, and the velocity there."""

    x_t: Tensor  # like x_0
    velocity: Tensor  # like x_0: the training target
    t: Tensor  # (B,)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t in 0..1 -> shift t / (1 + (shift - 1) t). A shift above 1 spends more of the path near noise."""
    return shift * t / (1 + (shift - 1) * t)


def flow_path(x_0: Tensor, noise: Tensor, t: Tensor) -> FlowSample:
    """x_0 and noise (B, ...), t (B,) -> the point at t on the path between them, and its velocity."""
    s = t.view(-1, *[1] * (x_0.ndim - 1))
    return FlowSample((1 - s) * x_0 + s * noise, noise - x_0, t)


def schedule(num_steps: int, shift: float) -> Tensor:
    """Returns num_steps + 1 times from 1 to 0. Raises UserError for fewer than 1 step, or a shift that is not positive and finite."""
    if num_steps < 1:
        raise UserError("sampling needs at least one step", where="steps", got=num_steps, expected="1 or more")
    if not (math.isfinite(shift) and shift > 0):
        raise UserError("the timestep shift must be a positive number", where="shift", got=shift, expected="1.0 to 10.0, say")
    return shift_time(torch.linspace(1, 0, num_steps + 1), shift)


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, times: Tensor, progress: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from times[0] to times[-1]. Raises UserError if a step gives values that are not finite."""
    x = noise
    for t, t_next in progress(list(zip(times[:-1].tolist(), times[1:].tolist()))):
        x = x + (t_next - t) * velocity(x, t)
        if not torch.isfinite(x).all():
            raise UserError("the latents are no longer finite", where=f"sampling at t = {t:.3f}", fix="lower cfg, or run the DiT in float32 or bfloat16")
    return x


def classifier_free_guidance(positive: Tensor, negative: Tensor | None = None, *, cfg: float) -> Tensor:
    """Classifier-free guidance of two velocities; without a negative one, returns the positive one."""
    return positive if negative is None else negative + cfg * (positive - negative)
