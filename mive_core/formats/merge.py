"""Merges LoRAs into a MiVE checkpoint: one file of the sum, written tensor by tensor."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .checkpoint import check_dit_shapes, read_config
from .lora_apply import changed_parameters, find_loras, sampled_with
from .quantize import MATRIX, QuantizedLayer
from .quantized import FORMATS, format_name
from .quantized_file import is_quantization_key, notes_of, read_dequantized
from .safetensors_file import DTYPES, FLOAT8, FileBytes, TensorFile, file_bytes, read_headers, read_metadata, resolve, stream_tensors
from .untrained import UNTRAINED_KEY, still_untrained, untrained_metadata, untrained_parts

MERGED_KEY = "mive.merged"  # in a checkpoint's metadata: JSON, the name and the strength of each LoRA that is in it
STORAGES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def merge(base: str | Path, loras: Sequence[tuple[str | Path, float]], destination: str | Path, storage: str | None = None) -> dict:
    """Reads a MiVE DiT (file, folder or sharded index), adds LoRA files at their strengths, writes one file, and returns a report.

    `storage`, one of STORAGES: the dtype of the new file; fp8 stores the blocks' matrices as `mive quantize` does and leaves the rest.
    None keeps each tensor's own dtype or format. Sums are computed in float32, and a distilled LoRA's
    sampling settings become the file's. Holds one tensor at a time. Raises UserError for files that do not fit.
    """
    if storage not in (None, *STORAGES):
        raise UserError("unknown data type", where="dtype", got=storage, expected=" or ".join(STORAGES))
    path, destination = resolve(base, "dit.safetensors"), Path(destination)
    config = read_config(path)
    headers = read_headers(path)
    files = {key: file for file in headers for key in file.shapes}
    shapes = {key: file.shapes[key] for key, file in files.items() if not is_quantization_key(key)}
    check_dit_shapes(path, shapes, config)
    found = find_loras(loras, shapes, config, path.name)
    inputs = (path, *(file.path for file in files.values()), *(lora.path for lora in found))
    if destination.exists() and any(destination.samefile(file) for file in inputs):
        raise UserError("the output would replace an input", where=destination, fix="choose another name")
    changed, config = changed_parameters(found), sampled_with(config, found)
    for lora in found:
        if lora.fit.num_fitting < lora.fit.num_keys:
            warnings.warn(f"{lora.path.name}: {lora.fit}", stacklevel=2)

    dtypes = {key: dtype_of(files[key], key, storage) for key in shapes}
    formats = {key: format_name(note) for key, note in notes_of(headers).items()} if storage is None else {}
    formats |= {key: "fp8" for key, dtype in dtypes.items() if dtype == torch.float8_e4m3fn and key not in formats}
    layers = {key: QuantizedLayer(key, shapes[key], name) for key, name in formats.items() if MATRIX.fullmatch(key) and FORMATS[name].fits(shapes[key])}
    layout = {name: entry for key in shapes for name, entry in (layers[key].layout if key in layers else {key: (dtypes[key], shapes[key])}).items()}
    owners = {name: layer for layer in layers.values() for name in layer.layout}

    def produce(name: str) -> Tensor | FileBytes:
        if name not in shapes:
            return owners[name].tensor(name)
        if name not in changed and name not in layers and DTYPES.get(files[name].dtypes[name]) == dtypes[name]:
            return file_bytes(files[name], name)
        weight = read_dequantized(files[name], name, torch.float32)
        for lora in found:
            if name in lora.parameters:
                lora.add_to(name, weight)
        if name in layers:
            return layers[name].quantize(weight)
        stored = weight.to(dtypes[name])
        if name in changed and not stored.isfinite().all():
            raise UserError("the sum is not finite", where=name, got=f"{dtypes[name]}", fix="check the LoRA, or choose bf16")
        return stored

    untrained = still_untrained(untrained_parts(path), changed)
    metadata = {key: value for key, value in read_metadata(path).items() if key != UNTRAINED_KEY}
    merged = [*json.loads(metadata.get(MERGED_KEY, "[]")), *({"lora": lora.path.name, "strength": lora.strength} for lora in found)]
    stream_tensors(destination, layout, produce, {**metadata, **config.to_metadata(), **untrained_metadata(untrained), MERGED_KEY: json.dumps(merged)})
    return {
        "loras": [{"lora": lora.path.name, "strength": lora.strength, "fit": str(lora.fit)} for lora in found],
        "changed": len(changed),
        "tensors": len(shapes),
        "untrained": list(untrained),
        "bytes": destination.stat().st_size,
    }


def dtype_of(file: TensorFile, key: str, storage: str | None) -> torch.dtype:
    """The dtype of a parameter in the new file; float8 only for the blocks' matrices."""
    own = DTYPES.get(file.dtypes[key], torch.bfloat16)  # quantised GGUF
    if storage == "fp8" or (storage is None and file.dtypes[key] in FLOAT8):
        return torch.float8_e4m3fn if MATRIX.fullmatch(key) else torch.bfloat16 if file.dtypes[key] in FLOAT8 else own
    return own if storage is None else STORAGES[storage]
