"""Quantises a MiVE checkpoint to 8 or 4 bits: most of the blocks' matrices are stored in a layout that ComfyUI reads natively, see quantized.py.

All other tensors keep their dtype: norms, biases and modulation are small, and the layers before and after the blocks are sensitive.
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
from .quantized import FORMATS, decode
from .quantized_file import is_quantization_key
from .safetensors_file import DTYPES, FLOAT8, FileBytes, file_bytes, read_headers, read_metadata, read_tensor, resolve, stream_tensors

KEPT_BLOCKS = {"nvfp4": 1}  # blocks kept at either end by default; `mive study formats` measures what each block's error makes of a forward
ALIASES = {"fp8_scaled": "fp8"}  # earlier names
MATRIX = re.compile(r"blocks\.(\d+)\.(self_attn\.[qkvo]|ffn\.[02])\.weight")
NUM_ROWS = 256  # random rows on which a matrix's product is measured


def quantize(source: str | Path, destination: str | Path, format_name: str = "fp8", keep_blocks: int | None = None) -> dict:
    """Quantises a MiVE DiT in 16 or 32 bits (file, folder or sharded index) to one file; returns a report.

    The first and the last `keep_blocks` blocks (None: KEPT_BLOCKS) stay as they are, and so do matrices whose sides the format cannot hold. Holds one tensor
    at a time. The report: bytes before and after, the matrices and those of them that were kept, and for each kind of matrix the relative error of its
    weights and of its product with normal rows, the largest over the blocks (root mean square over root mean square).
    Raises UserError for other models, for a file that is quantised already, for an unknown format, and if comfy-kitchen is missing.
    """
    format_name = ALIASES.get(format_name, format_name)
    if format_name not in FORMATS:
        raise UserError("unknown format", got=format_name, expected=" or ".join(FORMATS))
    path = resolve(source, "dit.safetensors")
    config = read_config(path)
    if keep_blocks is None:
        keep_blocks = min(KEPT_BLOCKS.get(format_name, 0), (config.num_blocks - 1) // 2)
    if keep_blocks < 0 or 2 * keep_blocks >= config.num_blocks:
        raise UserError("no block would be quantised", where="keep_blocks", got=keep_blocks, expected=f"0 to {(config.num_blocks - 1) // 2}")
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
    matrices = {key: int(match[1]) for key in files if (match := MATRIX.fullmatch(key))}
    layers = {
        key: QuantizedLayer(key, files[key].shapes[key], format_name)
        for key, block in matrices.items()
        if keep_blocks <= block < config.num_blocks - keep_blocks and FORMATS[format_name].fits(files[key].shapes[key])
    }
    if not layers:
        raise UserError(
            "the format holds none of the matrices",
            where=path,
            got=format_name,
            expected="sides that are multiples of {} and {}".format(*FORMATS[format_name].multiples),
        )
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
        stored = layers[key].quantize(weight)
        worst = errors.setdefault(key.split(".", 2)[2].removesuffix(".weight"), {"weight": 0.0, "product": 0.0})
        for kind, value in relative_errors(weight, layers[key].restored(stored)).items():
            worst[kind] = max(worst[kind], value)
        return stored

    stream_tensors(Path(destination), layout, produce, {**read_metadata(path), **config.to_metadata()})
    return {
        "format": format_name,
        "bytes_before": sum(file.path.stat().st_size for file in read_headers(path)),
        "bytes": Path(destination).stat().st_size,
        "matrices": list(layers),
        "kept": [key for key in matrices if key not in layers],
        "relative_error": errors,
    }


class QuantizedLayer:
    """The tensors under which a file stores one matrix; the scales are known once the matrix was quantised, and held until they are taken."""

    def __init__(self, key: str, shape: tuple[int, ...], format_name: str = "fp8"):
        self.format = FORMATS[format_name]
        self.key, layer = key, key.removesuffix(".weight")
        self.note_key = f"{layer}.comfy_quant"
        self.note = torch.frombuffer(bytearray(json.dumps(self.format.note).encode()), dtype=torch.uint8)
        self.parts: dict[str, Tensor] = {}
        self.layout = {f"{layer}.{part}": entry for part, entry in self.format.parts(*shape).items()}
        self.layout[self.note_key] = (torch.uint8, (len(self.note),))

    def quantize(self, weight: Tensor) -> Tensor:
        """A float32 matrix -> the one to store."""
        self.parts = self.format.encode(weight)
        return self.parts.pop("weight")

    def restored(self, stored: Tensor) -> Tensor:
        """What will be read of the matrix just quantised, in float32."""
        return decode({"weight": stored, **self.parts}, self.format.note, torch.float32)

    def tensor(self, key: str) -> Tensor:
        """A scale or the note, after `quantize`. Each scale is handed over once: those of all layers, kept until the end, would take memory."""
        return self.note if key == self.note_key else self.parts.pop(key.rsplit(".", 1)[1])


def relative_errors(weight: Tensor, restored: Tensor) -> dict[str, float]:
    """Relative errors of a matrix (out, in) and of its product with normal rows."""
    rows = torch.randn(NUM_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    pairs = {"weight": (weight, restored), "product": (F.linear(rows, weight), F.linear(rows, restored))}
    return {kind: float((b - a).norm() / a.norm().clamp(min=1e-30)) for kind, (a, b) in pairs.items()}
