"""A Linear whose weight stays as a file stores it: int8, mxfp8 or nvfp4. float8.py has the one for fp8."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantized import NVFP4_MAX, decode, format_name, hadamard, kitchen, rotation_group

# compute capability from which an NVIDIA card multiplies a format
MIN_CAPABILITY = {"fp8": (8, 9), "int8": (7, 5), "int8_unrotated": (7, 5), "mxfp8": (10, 0), "nvfp4": (10, 0)}
ON_CPU = ("fp8", "int8", "int8_unrotated")  # slowly, but the same arithmetic
MIN_ROWS = 17  # of the first factor in torch's product of int8 matrices on CUDA


class QuantizedLinear(nn.Module):
    """A Linear with a quantised weight, decoded at each use.

    If `multiplied`, the input is converted as well and the two are multiplied as they are, which is faster on cards that support it
    and rounds the input: int8 to 255 steps per row, mxfp8 and nvfp4 as the weight is rounded.
    """

    def __init__(self, parts: Mapping[str, Tensor], note: Mapping[str, Any], bias: Tensor, multiplied: bool = False):
        super().__init__()
        for name, part in parts.items():
            self.register_buffer(name, part)
        self.register_buffer("bias", bias)
        self.names, self.note, self.multiplied = tuple(parts), dict(note), multiplied
        self.out_features, self.in_features = len(bias), self.weight.shape[1] * (2 if note["format"] == "nvfp4" else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        parts = {name: getattr(self, name) for name in self.names}
        if not self.multiplied:
            return F.linear(x, decode(parts, self.note, x.dtype), self.bias)
        rows = x.flatten(0, -2)
        product = self._int8(rows) if self.note["format"] == "int8_tensorwise" else _blocks(rows, parts, self.note["format"])
        return (product + self.bias).unflatten(0, x.shape[:-1])

    def _int8(self, rows: Tensor) -> Tensor:
        """(N, I) -> (N, O), the input quantised per row."""
        if self.note.get("convrot"):
            group = rotation_group(self.note)
            rows = (rows.unflatten(1, (-1, group)) @ hadamard(group).to(rows)).flatten(1)
        num_rows = len(rows)
        rows = F.pad(rows, (0, 0, 0, max(MIN_ROWS - num_rows, 0)))
        scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-30) / 127
        product = torch._int_mm((rows.float() / scale).round().to(torch.int8), self.weight.T)[:num_rows]
        return (product.float() * scale[:num_rows] * self.weight_scale.float().view(1, -1)).to(rows.dtype)


def _blocks(rows: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """(N, I) -> (N, O) in mxfp8 or nvfp4, by comfy-kitchen."""
    num_rows = len(rows)
    if name == "mxfp8":
        rows = F.pad(rows, (0, 0, 0, -num_rows % 32))
        stored, scales = kitchen().quantize_mxfp8(rows, pad_32x=False)
        product = kitchen().scaled_mm_mxfp8(
            stored, parts["weight"], block_scale_a=scales, block_scale_b=parts["weight_scale"].view(torch.float8_e8m0fnu), out_dtype=rows.dtype
        )
        return product[:num_rows]
    rows = F.pad(rows, (0, 0, 0, -num_rows % 16))
    scale = (rows.abs().max().float() / NVFP4_MAX).clamp(min=1e-30)
    stored, scales = kitchen().quantize_nvfp4(rows, scale, pad_16x=False)
    product = kitchen().scaled_mm_nvfp4(
        stored,
        parts["weight"],
        tensor_scale_a=scale,
        tensor_scale_b=parts["weight_scale_2"].float(),
        block_scale_a=scales,
        block_scale_b=parts["weight_scale"].view(torch.float8_e4m3fn),
        out_dtype=rows.dtype,
    )
    return product[:num_rows]


def can_multiply(name: str, device: torch.device | str) -> bool:
    """Whether a device multiplies matrices of a format: a CPU that of 8 bits, a CUDA card as its compute capability says."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY[name]
    return device.type == "cpu" and name in ON_CPU


def multiplied_where_possible(notes: Mapping[str, Mapping[str, Any]], device: torch.device | str) -> bool:
    """Whether all matrices can be multiplied as they are stored; warns where the device cannot."""
    names = sorted({format_name(note) for note in notes.values()})
    if impossible := [name for name in names if not can_multiply(name, device)]:
        warnings.warn(
            f"{torch.device(device)} does not multiply {' and '.join(impossible)}: the matrices stay so in memory and are scaled back at each use", stacklevel=3
        )
    return not impossible
