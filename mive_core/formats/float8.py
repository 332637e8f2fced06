"""Linear layers with 8-bit weights, under the keys of `mive quantize` and ComfyUI."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODES = ("scaled_back", "kept", "multiplied")  # dequantised on reading; at each use; never, on cards that multiply float8


class Float8Linear(nn.Module):
    """A Linear with a float8 weight and one scale.

    The weight is dequantised at each use. If `multiplied`, the input is converted to float8 as well and the two are multiplied
    directly, which is faster on cards that support it and rounds the input to three mantissa bits.
    """

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
        quantised, scale = to_float8(x.flatten(0, -2), self.weight.dtype)
        product = torch._scaled_mm(quantised, self.weight.T, scale_a=scale.float(), scale_b=self.weight_scale, bias=self.bias, out_dtype=x.dtype)
        return product.unflatten(0, x.shape[:-1])


def to_float8(weight: Tensor, storage: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns weight / scale rounded to float8, and the scale: a scalar that maps the largest entry to the type's maximum."""
    scale = weight.abs().max() / torch.finfo(storage).max
    scale = torch.where(scale > 0, scale, 1.0)  # on the device; reading the value on the host would wait for it
    return (weight / scale).to(storage), scale
