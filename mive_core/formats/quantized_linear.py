"""A Linear whose weight stays as a file stores it: int8, mxfp8 or nvfp4. float8.py has the one for fp8."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .quantized import INPUT_FACTOR, decode, format_name, rotate, rotation_group, to_int8

# compute capability from which an NVIDIA card multiplies a format
MIN_CAPABILITY = {"fp8": (8, 9), "int8": (7, 5), "int8_unrotated": (7, 5), "mxfp8": (10, 0), "nvfp4": (10, 0)}
MULTIPLIED_HERE = ("fp8", "int8", "int8_unrotated")  # by torch, on a CPU as well; ComfyUI multiplies the others by comfy-kitchen
MIN_ROWS = 17  # of the first factor in torch's product of int8 matrices on CUDA


class QuantizedLinear(nn.Module):
    """A Linear with a quantised weight, decoded at each use.

    If `multiplied`, which is for int8 only, the input is converted to int8 per row and the two are multiplied as they are: faster on cards
    that support it, and less exact.
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
        return (self._product(x.flatten(0, -2)) + self.bias).unflatten(0, x.shape[:-1])

    def _product(self, rows: Tensor) -> Tensor:
        """(N, I) -> (N, O), the input quantised per row."""
        if INPUT_FACTOR in self.names:
            rows = rows * self.pre_quant_scale.to(rows)
        if self.note.get("convrot"):
            rows = rotate(rows, rotation_group(self.note))
        num_rows = len(rows)
        rows = F.pad(rows, (0, 0, 0, max(MIN_ROWS - num_rows, 0)))
        rounded = to_int8(rows.float())
        product = torch._int_mm(rounded["weight"], self.weight.T)[:num_rows]
        return (product.float() * rounded["weight_scale"][:num_rows] * self.weight_scale.float().view(1, -1)).to(rows.dtype)


def can_multiply(name: str, device: torch.device | str) -> bool:
    """Whether a device multiplies matrices of a format: a CUDA card as its compute capability says, a CPU those of MULTIPLIED_HERE."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY[name]
    return device.type == "cpu" and name in MULTIPLIED_HERE


def multiplied_where_possible(notes: Mapping[str, Mapping[str, Any]], device: torch.device | str) -> bool:
    """Whether all matrices of a file can be multiplied as they are stored; warns if they cannot."""
    names = sorted({format_name(note) for note in notes.values()})
    if impossible := [name for name in names if name not in MULTIPLIED_HERE or not can_multiply(name, device)]:
        reason = "is not multiplied on the command line" if set(impossible).isdisjoint(MULTIPLIED_HERE) else f"is not multiplied by this device, {device}"
        warnings.warn(f"{' and '.join(impossible)} {reason}: the matrices stay so in memory and are scaled back at each use", stacklevel=3)
    return not impossible
