"""Optimizers beside torch's. Muon: momentum whose every matrix step has equal singular values. AdamW in 8 bits: torchao's.

Muon: convolution weights are flattened to (out, in * taps). Each step moves a weight by a fixed fraction of
its own norm, so one rate fits layers of all sizes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UserError

# Quintic iteration x <- a x + b x^3 + c x^5 that drives singular values in (0, 1] towards 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, num_steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, M, N) -> float32 (B, M, N) with the same singular vectors and singular values near 1 (0.7 to 1.2); products in `dtype`."""
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
    """Orthogonalised Nesterov momentum; `lr` is the fraction of a weight's norm that one step moves it.

    Takes weights of two dimensions or more. `floor` is the norm below which a weight counts as that large;
    `dtype` is that of the products.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float = 3e-3, momentum: float = 0.95, floor: float = 0.1, dtype: torch.dtype = torch.float32):
        super().__init__(weights, {"lr": lr, "momentum": momentum, "floor": floor})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.flatten(1).shape, []).append(weight)
            for weights in alike.values():
                self._move(weights, group["lr"], group["momentum"], group["floor"])

    def _move(self, weights: list[nn.Parameter], lr: float, momentum: float, floor: float) -> None:
        """Weights of one shape: their products are done together."""
        directions = orthogonalise(torch.stack([self._averaged(weight, momentum) for weight in weights]), dtype=self.dtype)
        for weight, direction in zip(weights, directions):
            size = lr * weight.norm().clamp(min=floor) / (direction.norm() + 1e-12)
            weight.sub_(direction.view_as(weight) * size)

    def _averaged(self, weight: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        average = state["momentum"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum).flatten(1)


def adamw_8bit(weights: Iterable[nn.Parameter | dict], **settings) -> torch.optim.Optimizer:
    """torchao's AdamW, whose two averages take a byte each. Raises UserError where the package is missing."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("the optimizer adamw_8bit needs the package torchao", got=str(error), fix='pip install "mive[8bit]", or take adamw') from None
    return AdamW8bit(list(weights), **settings)


def unpacked(value: object) -> dict[str, Tensor]:
    """The plain tensors of one in 8 bits, as a file can hold them, by name; {} of any other value."""
    return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]} if type(value).__name__ == "OptimState8bit" else {}


def packed(name: str, parts: dict[str, Tensor]) -> Tensor:
    """The inverse, of AdamW's average of that name."""
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(**parts, signed=name == "exp_avg", dtype=torch.float32)
