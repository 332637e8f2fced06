"""Linear layers whose weights stay in 8 bits, under the keys that `mive quantize` and ComfyUI give them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("scaled_back", "kept", "multiplied")  # when read; at each use; never, where the machine multiplies float8


class Float8Linear(nn.Module):
    """A Linear in float8 with one scale. The weight is scaled back at each use, or else the input is stored in float8 too and both
    are multiplied as they are, which is faster on cards that can and rounds the input to three bits after the point."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor, multiplied: bool = False):
        super().__init__()
        self.register_buffer("weight", weight)  # (out, in)
        self.register_buffer("weight_scale", scale)  # float32 scalar
        self.register_buffer("bias", bias)
        self.multiplied = multiplied
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.multiplied:
            return F.linear(x, self.weight.to(x.dtype).mul_(self.weight_scale.to(x.dtype)), self.bias)
        stored, scale = to_float8(x.flatten(0, -2), self.weight.dtype)
        product = torch._scaled_mm(stored, self.weight.T, scale_a=scale.float(), scale_b=self.weight_scale, bias=self.bias, out_dtype=x.dtype)
        return product.unflatten(0, x.shape[:-1])


def to_float8(weight: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest float8 of weight / scale, and the scale: a scalar that lays the largest entry on the type's largest."""
    scale = weight.abs().max() / torch.finfo(storage).max
    scale = torch.where(scale > 0, scale, 1.0)  # decided on the device: asking for the number would wait for it
    return (weight / scale).to(storage), scale
