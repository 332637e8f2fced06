"""Muon: momentum whose every matrix step has equal singular values.

Convolution weights are flattened to (out, in * taps). Each step moves a weight by a fixed fraction of
its own norm, so one rate fits layers of all sizes.
"""

from typing import Iterable

import torch
from torch import Tensor, nn

# Quintic iteration x <- a x + b x^3 + c x^5 that drives singular values in (0, 1] towards 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, num_steps: int = 5) -> Tensor:
    """(M, N) -> (M, N) with the same singular vectors and singular values near 1 (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-12)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum; `lr` is the fraction of a weight's norm that one step moves it.

    Takes weights of two dimensions or more. `floor` is the norm below which a weight counts as that large.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 3e-3, momentum: float = 0.95, floor: float = 0.1):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "floor": floor})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group["lr"], group["momentum"], group["floor"])

    def _move(self, weight: nn.Parameter, lr: float, momentum: float, floor: float) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(weight.grad, 1 - momentum)
        direction = orthogonalise(weight.grad.lerp(average, momentum).flatten(1))
        size = lr * weight.norm().clamp(min=floor) / (direction.norm() + 1e-12)
        weight.sub_(direction.view_as(weight) * size)
