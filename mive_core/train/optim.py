"""Optimizers that torch lacks: Muon, and torchao's AdamW with 8-bit moments; and a schedule of learning rates.

Muon orthogonalises the momentum of each weight matrix, so that all singular values of an update are nearly equal. Convolution weights
are flattened to (out, in * taps). Each step moves a weight by a fixed fraction of its own norm, so one learning rate fits layers of all sizes.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

# Coefficients a, b, c of the quintic Newton-Schulz iteration x <- a x + b x^3 + c x^5, which drives singular values in (0, 1] towards 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, num_steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, M, N) -> float32 (B, M, N) with the same singular vectors and singular values near 1 (0.7 to 1.2). Matrix products run in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)).to(dtype)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.float()
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; `lr` is the size of a step as a fraction of the weight's norm.

    Weights need two dimensions or more. `min_norm` is a lower bound on the norm in that fraction, so that weights near zero can grow;
    `dtype` is the dtype of the matrix products.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 3e-3, momentum: float = 0.95, min_norm: float = 0.1, dtype: torch.dtype = torch.float32):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "min_norm": min_norm})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.flatten(1).shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group["lr"], group["momentum"], group["min_norm"])

    def _update(self, weights: list[nn.Parameter], lr: float, momentum: float, min_norm: float) -> None:
        """Updates weights of one shape together, in batched matrix products."""
        directions = orthogonalise(torch.stack([self._nesterov(weight, momentum) for weight in weights]), dtype=self.dtype)
        for weight, direction in zip(weights, directions):
            size = lr * weight.norm().clamp(min=min_norm) / (direction.norm() + 1e-12)
            weight.sub_(direction.view_as(weight) * size)

    def _nesterov(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Updates the momentum of a weight and returns its Nesterov direction, (out, rest)."""
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum).flatten(1)


def adamw_8bit(weights: Iterable[nn.Parameter | dict], **settings) -> torch.optim.Optimizer:
    """Returns torchao's AdamW, whose two moments take one byte each per weight. Raises UserError if torchao is missing."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("the optimizer adamw_8bit needs the package torchao", got=str(error), fix='pip install "mive[8bit]", or take adamw') from None
    return AdamW8bit(list(weights), **settings)


def flatten_8bit(value: Any) -> dict[str, Tensor]:
    """Splits an 8-bit optimizer state tensor into named plain tensors, which safetensors can store; returns {} for any other value."""
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]} if type(value).__name__ == "OptimState8bit" else {}


def unflatten_8bit(name: str, parts: dict[str, Tensor]) -> Tensor:
    """Inverse of flatten_8bit for the AdamW moment `name`, exp_avg or exp_avg_sq."""
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(**parts, signed=name == "exp_avg", dtype=torch.float32)


def warmup_cosine(step: int, num_steps: int, num_warmup_steps: int, final_ratio: float) -> float:
    """The factor on a learning rate: linear warmup, then a cosine decay to `final_ratio`."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
