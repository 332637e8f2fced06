"""Reads quantised matrices of safetensors files: what a file says of each, its stored parts, and the weight that they decode to."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import gguf_file
from .quantized import INPUT_FACTOR, STORED, decode, read_note
from .safetensors_file import DTYPES, FLOAT8, GLOBAL_SCALE, TensorFile, read_bytes, read_tensor

INTEGERS = {"I8": torch.int8, "U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}  # read as parts of a quantised matrix only
SCALE_SUFFIXES = (".weight_scale", ".scale_weight")  # of a layer's 8-bit weight: ComfyUI's present and former spelling
NOTE_SUFFIX = ".comfy_quant"
QUANTIZATION_SUFFIXES = (NOTE_SUFFIX, GLOBAL_SCALE, f".{INPUT_FACTOR}", ".input_scale", ".scale_input", "scaled_fp8")  # other keys of 8-bit storage
NOTES_KEY = "_quantization_metadata"  # in the metadata of files that have no note at each layer


def scale_key(file: TensorFile, key: str) -> str | None:
    """The key of an 8-bit weight's scale; None for other weights, or if the file has no scale for it."""
    layer = key.removesuffix(".weight")
    return next((layer + suffix for suffix in SCALE_SUFFIXES if layer + suffix in file.shapes), None) if file.dtypes[key] in FLOAT8 else None


def read_dequantized(file: TensorFile, key: str, dtype: torch.dtype) -> Tensor:
    """Reads one weight in `dtype`; a quantised one is decoded. Raises UserError as `note_of` and `read_parts` do."""
    if (note := note_of(file, key)) is not None:
        return decode(read_parts(file, key), note, dtype)
    return read_tensor(file, key).to(dtype)


def note_of(file: TensorFile, key: str) -> dict[str, Any] | None:
    """What a file says of a quantised weight; None of others, and of float8 without a scale.

    Raises UserError if the note is damaged, names a layout that is not known or not the one in the file, or if a scale is missing.
    """
    layer = key.removesuffix(".weight")
    if layer == key or file.path.suffix.lower() == gguf_file.SUFFIX:
        return None
    if layer + NOTE_SUFFIX in file.shapes:
        note = read_note(read_bytes(file, layer + NOTE_SUFFIX).tobytes(), f"{file.path}, {layer}")
    elif (text := _layer_notes(file.metadata.get(NOTES_KEY, ""), file.path).get(layer)) is not None:
        note = read_note(json.dumps(text).encode(), f"{file.path}, {layer}")
    elif scale_key(file, key) is not None:
        note = {"format": {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}[file.dtypes[key]]}
    else:
        return None
    names = _part_names(file, key)
    for part, known in STORED[note["format"]].items():
        name = names[part]
        if file.dtypes.get(name) not in known:
            raise UserError(
                "a quantised matrix is not what its note says",
                where=file.path,
                got=f"{name} as {file.dtypes[name]}" if name in file.dtypes else f"no {name}",
                expected=f"{note['format']}, with {name} as {' or '.join(sorted(known))}",
                fix="download it again",
            )
    return note


def read_parts(file: TensorFile, key: str) -> dict[str, Tensor]:
    """The stored tensors of a quantised weight, by the last part of their keys."""
    parts = {}
    for part, name in _part_names(file, key).items():
        if name in file.offsets:
            stored, shape = torch.from_numpy(read_bytes(file, name)).view((DTYPES | INTEGERS)[file.dtypes[name]]), file.shapes[name]
            parts[part] = stored.view(shape[0], -1) if part == "weight" else stored.view(shape)
    return parts


def _part_names(file: TensorFile, key: str) -> dict[str, str]:
    layer = key.removesuffix(".weight")
    return {
        "weight": key,
        "weight_scale": scale_key(file, key) or f"{layer}.weight_scale",
        "weight_scale_2": layer + GLOBAL_SCALE,
        INPUT_FACTOR: f"{layer}.{INPUT_FACTOR}",
    }


@cache
def _layer_notes(text: str, path: Path) -> dict[str, Any]:
    """The notes in a file's metadata, by layer."""
    try:
        return dict(json.loads(text)["layers"]) if text else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError("the notes on quantised matrices are damaged", where=path, got=str(error), fix="download it again") from None


def notes_of(files: Iterable[TensorFile]) -> dict[str, dict[str, Any]]:
    """Notes on all quantised weights, by key. Raises UserError as `note_of` does, and for a matrix of integers that has no note."""
    notes = {}
    for file in files:
        for key in (key for key in file.shapes if key.endswith(".weight")):
            note = note_of(file, key)
            if note is not None:
                notes[key] = note
            elif file.dtypes[key] in INTEGERS:
                raise UserError(
                    "a matrix of integers has no note that says how to read it", where=file.path, got=f"{key} as {file.dtypes[key]}", fix="download it again"
                )
    return notes


def is_quantization_key(key: str) -> bool:
    """Whether a key belongs to 8-bit storage and not to the model."""
    return key.endswith((*SCALE_SUFFIXES, *QUANTIZATION_SUFFIXES))
