"""A MiVE checkpoint in 8 bits: the blocks' matrices as float8 with one scale each, in the layout that ComfyUI reads natively.

Beside `layer.weight` stand `layer.weight_scale`, a float32 scalar, and `layer.comfy_quant`, JSON in bytes. Everything else
keeps its dtype: norms, biases and modulation are small, and what enters and leaves the blocks is sensitive.
D model width.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from . import gguf_file
from .checkpoint import check_whole, read_config
from .float8 import to_float8
from .safetensors_file import DTYPES, FLOAT8, FileBytes, file_bytes, is_scale, read_headers, read_tensor, resolve, stream_tensors

FORMATS = {"fp8_scaled": (torch.float8_e4m3fn, "float8_e4m3fn")}  # name -> storage, and what ComfyUI calls it
MATRIX = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.[02])\.weight")
NUM_TRIED = 256  # rows that a matrix's product is measured on


def quantize(source: str | Path, destination: str | Path, form: str = "fp8_scaled") -> dict:
    """A MiVE DiT in 16 or 32 bits (file, folder or sharded index) -> one file with 8-bit matrices; returns the report.

    Holds one tensor at a time. The report: bytes before and after, and of each kind of matrix the relative error of
    its weights and of its product with normal rows, largest over the blocks (root mean square over root mean square).
    Raises UserError for other models, for a file that is in 8 bits already, and for an unknown format.
    """
    if form not in FORMATS:
        raise UserError("unknown format", got=form, expected=" or ".join(FORMATS))
    storage, name = FORMATS[form]
    path = resolve(source, "dit.safetensors")
    config = read_config(path)
    where = {key: file for file in read_headers(path) for key in file.shapes}
    check_whole(path, {key: file.shapes[key] for key, file in where.items()}, config)
    small = [key for key, file in where.items() if file.dtypes[key] in FLOAT8 | gguf_file.QUANTISED.keys() or is_scale(key)]
    if small:
        raise UserError(
            "the checkpoint is in 8 bits already, or fewer", where=path, got=f"{small[0]} as {where[small[0]].dtypes[small[0]]}", expected="16 or 32 bits"
        )
    note = torch.frombuffer(bytearray(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, file in where.items():
        if MATRIX.fullmatch(key):
            layer = key.removesuffix(".weight")
            layout |= {key: (storage, file.shapes[key]), f"{layer}.weight_scale": (torch.float32, ()), f"{layer}.comfy_quant": (torch.uint8, (len(note),))}
        else:
            layout[key] = (DTYPES[file.dtypes[key]], file.shapes[key])
    made: dict[str, Tensor] = {}  # the scale that belongs to the weight before it
    errors: dict[str, dict[str, float]] = {}

    def produce(key: str) -> Tensor | FileBytes:
        if key in where and not MATRIX.fullmatch(key):
            return file_bytes(where[key], key)
        if key.endswith(".comfy_quant"):
            return note
        if key.endswith(".weight_scale"):
            return made.pop(key)
        weight = read_tensor(where[key], key).float()
        stored, scale = to_float8(weight, storage)
        made[f"{key.removesuffix('.weight')}.weight_scale"] = scale
        found = errors.setdefault(key.split(".", 2)[2].removesuffix(".weight"), {"weight": 0.0, "product": 0.0})
        for kind, value in measure(weight, stored.float() * scale).items():
            found[kind] = max(found[kind], value)
        return stored

    stream_tensors(Path(destination), layout, produce, config.to_metadata())
    before = sum(file.path.stat().st_size for file in read_headers(path))
    return {"format": form, "bytes_before": before, "bytes": Path(destination).stat().st_size, "relative_error": errors}


def measure(weight: Tensor, restored: Tensor) -> dict[str, float]:
    """Relative errors of a matrix (out, in) and of its product with normal rows."""
    rows = torch.randn(NUM_TRIED, weight.shape[1], generator=torch.Generator().manual_seed(0))
    pairs = {"weight": (weight, restored), "product": (F.linear(rows, weight), F.linear(rows, restored))}
    return {kind: float((b - a).norm() / a.norm().clamp(min=1e-30)) for kind, (a, b) in pairs.items()}
