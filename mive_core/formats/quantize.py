"""Quantises a MiVE checkpoint to 8 bits: the blocks' matrices become float8 with one scale each, in the layout that ComfyUI reads natively.

Each `layer.weight` is accompanied by `layer.weight_scale`, a float32 scalar, and `layer.comfy_quant`, JSON in bytes. All other
tensors keep their dtype: norms, biases and modulation are small, and the layers before and after the blocks are sensitive.
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
from .checkpoint import check_dit_shapes, read_config
from .float8 import to_float8
from .safetensors_file import DTYPES, FLOAT8, FileBytes, file_bytes, is_quantization_key, read_headers, read_metadata, read_tensor, resolve, stream_tensors

FORMATS = {"fp8_scaled": (torch.float8_e4m3fn, "float8_e4m3fn")}  # name -> dtype, ComfyUI's name of it
MATRIX = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.[02])\.weight")
NUM_ROWS = 256  # random rows on which a matrix's product is measured


def quantize(source: str | Path, destination: str | Path, format_name: str = "fp8_scaled") -> dict:
    """Quantises a MiVE DiT in 16 or 32 bits (file, folder or sharded index) to one file with 8-bit matrices; returns a report.

    Holds one tensor at a time. The report: bytes before and after, and for each kind of matrix the relative error of
    its weights and of its product with normal rows, the largest over the blocks (root mean square over root mean square).
    Raises UserError for other models, for a file that is in 8 bits already, and for an unknown format.
    """
    if format_name not in FORMATS:
        raise UserError("unknown format", got=format_name, expected=" or ".join(FORMATS))
    path = resolve(source, "dit.safetensors")
    config = read_config(path)
    files = {key: file for file in read_headers(path) for key in file.shapes}
    check_dit_shapes(path, {key: file.shapes[key] for key, file in files.items()}, config)
    quantised = [key for key, file in files.items() if file.dtypes[key] in FLOAT8 | gguf_file.QUANTISED.keys() or is_quantization_key(key)]
    if quantised:
        raise UserError(
            "the checkpoint is in 8 bits already, or fewer",
            where=path,
            got=f"{quantised[0]} as {files[quantised[0]].dtypes[quantised[0]]}",
            expected="16 or 32 bits",
        )
    layers = {key: Float8Layer(key, file.shapes[key], format_name) for key, file in files.items() if MATRIX.fullmatch(key)}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for key, file in files.items():
        layout |= layers[key].layout if key in layers else {key: (DTYPES[file.dtypes[key]], file.shapes[key])}
    owners = {name: layer for layer in layers.values() for name in layer.layout}
    errors: dict[str, dict[str, float]] = {}

    def produce(key: str) -> Tensor | FileBytes:
        if key not in owners:
            return file_bytes(files[key], key)
        if key not in layers:
            return owners[key].tensor(key)
        weight = read_tensor(files[key], key).float()
        weight_float8 = layers[key].quantize(weight)
        worst = errors.setdefault(key.split(".", 2)[2].removesuffix(".weight"), {"weight": 0.0, "product": 0.0})
        for kind, value in relative_errors(weight, weight_float8.float() * layers[key].scale).items():
            worst[kind] = max(worst[kind], value)
        return weight_float8

    stream_tensors(Path(destination), layout, produce, {**read_metadata(path), **config.to_metadata()})
    before = sum(file.path.stat().st_size for file in read_headers(path))
    return {"format": format_name, "bytes_before": before, "bytes": Path(destination).stat().st_size, "relative_error": errors}


class Float8Layer:
    """The three tensors under which a file stores one 8-bit matrix; the scale is known once the matrix was quantised."""

    def __init__(self, key: str, shape: tuple[int, ...], format_name: str = "fp8_scaled"):
        self.storage, comfy_name = FORMATS[format_name]
        self.key, layer = key, key.removesuffix(".weight")
        self.scale_key, self.note_key = f"{layer}.weight_scale", f"{layer}.comfy_quant"
        self.note = torch.frombuffer(bytearray(json.dumps({"format": comfy_name}).encode()), dtype=torch.uint8)
        self.scale = 1.0  # a number: scalar tensors of all layers, kept until the end, would fragment the memory
        self.layout = {key: (self.storage, shape), self.scale_key: (torch.float32, ()), self.note_key: (torch.uint8, (len(self.note),))}

    def quantize(self, weight: Tensor) -> Tensor:
        """A float32 matrix -> the one to store."""
        quantised, scale = to_float8(weight, self.storage)
        self.scale = float(scale)
        return quantised

    def tensor(self, key: str) -> Tensor:
        """The scale or the note, after `quantize`."""
        return self.note if key == self.note_key else torch.tensor(self.scale)


def relative_errors(weight: Tensor, restored: Tensor) -> dict[str, float]:
    """Relative errors of a matrix (out, in) and of its product with normal rows."""
    rows = torch.randn(NUM_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    pairs = {"weight": (weight, restored), "product": (F.linear(rows, weight), F.linear(rows, restored))}
    return {kind: float((b - a).norm() / a.norm().clamp(min=1e-30)) for kind, (a, b) in pairs.items()}
