"""How a matrix is stored in 8 or 4 bits: the layouts that ComfyUI's quantised layers read natively.

A layer `x` is stored as `x.weight`, its scales, and a note `x.comfy_quant`: JSON in bytes, with ComfyUI's name of the layout.

| format | entry | scales |
|---|---|---|
| fp8 | float8 e4m3 | one float32 |
| mxfp8 | float8 e4m3 | a power of two per 32 entries of a row |
| nvfp4 | 4-bit e2m1, two in a byte | float8 per 16 entries of a row, and one float32 |
| int8 | int8, of rows rotated by a Hadamard matrix in groups of 256 | one float32 per row |
| int8_unrotated | int8 | one float32 per row |

mxfp8 and nvfp4 are encoded and decoded by the package comfy-kitchen. O rows (outputs), I columns (inputs).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .float8 import to_float8

GROUP = 256  # entries that are rotated together
INPUT_FACTOR = "pre_quant_scale"
NVFP4_MAX = 6.0 * 448.0  # largest 4-bit entry times the largest float8 scale
Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Format:
    """A layout: what is written, and which matrices it can hold."""

    note: dict[str, Any]
    multiples: tuple[int, int]  # of which O and I must be
    parts: Callable[[int, int], Parts]  # O, I -> dtype and shape of the weight and its scales, by the last part of their keys
    encode: Callable[[Tensor], dict[str, Tensor]]  # float32 (O, I) -> those tensors

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and not any(side % multiple for side, multiple in zip(shape, self.multiples))


def decode(parts: Mapping[str, Tensor], note: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The stored tensors of a layer and its note -> the weight (O, I) in `dtype`. Raises UserError if comfy-kitchen is needed and missing.

    A `pre_quant_scale` (I,), by which calibrated files multiply the layer's input, is multiplied into the weight.
    """
    weight, scale = parts["weight"], parts["weight_scale"]
    if note["format"].startswith("float8"):
        decoded = weight.to(dtype).mul_(scale.to(dtype) if scale.numel() == 1 else scale.to(dtype).view(-1, 1))
    elif note["format"] == "int8_tensorwise":
        restored = weight.float() * scale.float().view(-1, 1)
        decoded = (rotate(restored, rotation_group(note)) if note.get("convrot") else restored).to(dtype)
    elif note["format"] == "mxfp8":
        decoded = kitchen().dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu), dtype)
    else:
        decoded = kitchen().dequantize_nvfp4(weight, parts["weight_scale_2"].float(), scale.view(torch.float8_e4m3fn), dtype)
    return decoded.mul_(parts[INPUT_FACTOR].to(dtype).view(1, -1)) if INPUT_FACTOR in parts else decoded


def rotate(weight: Tensor, group: int) -> Tensor:
    """(O, I) -> (O, I): multiplies each `group` of columns by a Hadamard matrix; symmetric and orthogonal, it is its own inverse."""
    return (weight.unflatten(1, (-1, group)) @ hadamard(group).to(weight)).flatten(1)


@cache
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix of a power of 4, with rows of length 1: the Kronecker power of four rows with one minus sign each."""
    small = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, small)
    return matrix / size**0.5


def rotation_group(note: Mapping[str, Any]) -> int:
    """Entries that are rotated together."""
    return int(note.get("convrot_groupsize", GROUP))


def kitchen() -> Any:
    """The package comfy-kitchen. Raises UserError if it is missing, or older than mxfp8."""
    try:
        import comfy_kitchen

        _ = comfy_kitchen.quantize_mxfp8
    except (ImportError, AttributeError) as error:
        raise UserError(
            "mxfp8 and nvfp4 need the package comfy-kitchen", got=str(error), fix='pip install "comfy-kitchen>=0.2.24", or take fp8 or int8'
        ) from error
    return comfy_kitchen


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    quantised, scale = to_float8(weight, torch.float8_e4m3fn)
    return {"weight": quantised, "weight_scale": scale}


def to_int8(weight: Tensor) -> dict[str, Tensor]:
    """Rounds each row of float32 (O, I) to int8, with a scale of its own."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _mxfp8(weight: Tensor) -> dict[str, Tensor]:
    quantised, scales = kitchen().quantize_mxfp8(weight, pad_32x=False)
    return {"weight": quantised, "weight_scale": scales.view(torch.uint8)}


def _nvfp4(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.abs().max() / NVFP4_MAX).clamp(min=1e-30)
    quantised, scales = kitchen().quantize_nvfp4(weight, scale, pad_16x=False)
    return {"weight": quantised, "weight_scale": scales, "weight_scale_2": scale}


def _tiled(rows: int, columns: int) -> tuple[int, int]:
    """Shape of block scales, which tensor cores read in tiles of 128 x 4."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def _row_scaled(rows: int, columns: int) -> Parts:
    return {"weight": (torch.int8, (rows, columns)), "weight_scale": (torch.float32, (rows, 1))}


INT8 = {"format": "int8_tensorwise"}
FORMATS = {
    "fp8": Format({"format": "float8_e4m3fn"}, (1, 1), lambda o, i: {"weight": (torch.float8_e4m3fn, (o, i)), "weight_scale": (torch.float32, ())}, _fp8),
    "mxfp8": Format(
        {"format": "mxfp8"}, (32, 32), lambda o, i: {"weight": (torch.float8_e4m3fn, (o, i)), "weight_scale": (torch.uint8, _tiled(o, i // 32))}, _mxfp8
    ),
    "nvfp4": Format(
        {"format": "nvfp4"},
        (16, 16),
        lambda o, i: {"weight": (torch.uint8, (o, i // 2)), "weight_scale": (torch.float8_e4m3fn, _tiled(o, i // 16)), "weight_scale_2": (torch.float32, ())},
        _nvfp4,
    ),
    "int8": Format(INT8 | {"convrot": True, "convrot_groupsize": GROUP}, (1, GROUP), _row_scaled, lambda weight: to_int8(rotate(weight, GROUP))),
    "int8_unrotated": Format(INT8, (1, 1), _row_scaled, to_int8),
}
FLOATS = {"F32", "BF16", "F16"}
STORED = {  # ComfyUI's name of a layout -> the dtypes, as files spell them, of a weight and its scales
    "float8_e4m3fn": {"weight": {"F8_E4M3"}, "weight_scale": FLOATS},
    "float8_e5m2": {"weight": {"F8_E5M2"}, "weight_scale": FLOATS},
    "mxfp8": {"weight": {"F8_E4M3"}, "weight_scale": {"U8", "F8_E8M0"}},
    "nvfp4": {"weight": {"U8"}, "weight_scale": {"F8_E4M3", "U8"}, "weight_scale_2": FLOATS},
    "int8_tensorwise": {"weight": {"I8"}, "weight_scale": FLOATS},
}


def format_name(note: Mapping[str, Any]) -> str:
    """The name in FORMATS of what a note describes; fp8 for float8_e5m2 as well."""
    name = note["format"]
    return "fp8" if name.startswith("float8") else ("int8" if note.get("convrot") else "int8_unrotated") if name == "int8_tensorwise" else name


def read_note(data: bytes, where: str | Path) -> dict[str, Any]:
    """The bytes of a `comfy_quant` tensor -> its entries. Raises UserError for damaged ones and for layouts that are not read here."""
    try:
        note = json.loads(data)
        note = note.get("params", {}) | note  # some writers nest the rotation
        name = note["format"]
        if note.get("convrot") and (group := rotation_group(note)) not in (4, 16, 64, 256, 1024):
            raise ValueError(f"rotated in groups of {group}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("the note on a quantised matrix is damaged", where=where, got=f"{type(error).__name__}: {error}", fix="download it again") from None
    if name not in STORED:
        raise UserError("this quantised format cannot be read", where=where, got=name, expected=", ".join(STORED))
    return note
