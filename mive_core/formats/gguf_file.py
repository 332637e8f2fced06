"""Headers of GGUF files: names, shapes, types and offsets. The package gguf dequantises their tensors.

Everything that a header declares is checked against the file's size before it is used.
"""

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

SUFFIX, MAGIC, VERSIONS = ".gguf", b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # value type -> struct's format character
STRING, ARRAY = 8, 9
MAX_COUNT = 1_000_000  # of tensors and of entries; a vocabulary has fewer
MAX_DIMENSIONS = 4
ALIGNMENT_KEY, SHAPE_KEY = "general.alignment", "comfy.gguf.orig_shape."  # the latter holds shapes of more than GGUF's four dimensions
# type number in the file -> name, elements per block, bytes per block
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
QUANTISED = {name: (block, size) for name, block, size in TYPES.values() if block > 1}


class Reader:
    """Reads a file sequentially. Raises UserError if the file ends too early."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.size = file, path, os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise UserError(
                "the file is truncated",
                where=self.path,
                got=f"{self.size} bytes",
                expected=f"at least {self.file.tell() + count} bytes",
                fix="download it again",
            )
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.read(struct.calcsize(code)))[0]

    def count(self, what: str) -> int:
        value = self.number("Q")
        if value > MAX_COUNT:
            raise UserError(f"the number of {what} is not believable", where=self.path, got=value, expected=f"at most {MAX_COUNT}", fix="download it again")
        return value

    def text(self) -> str:
        return self.read(self.number("Q")).decode("utf-8", "replace")

    def value(self) -> Any:
        """Reads a number, a string, or a list of them; lists of lists are not supported."""
        value_type = self.number("I")
        if value_type != ARRAY:
            return self.scalar(value_type)
        item_type = self.number("I")
        return [self.scalar(item_type) for _ in range(self.count("entries"))]

    def scalar(self, value_type: int) -> Any:
        if value_type == STRING:
            return self.text()
        if value_type not in SCALARS:
            raise UserError("this GGUF file has a kind of value that is not known", where=self.path, got=value_type, expected="0 to 12, no lists of lists")
        return self.number(SCALARS[value_type])


def read_gguf_header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str], dict[str, tuple[int, int]]]:
    """Returns shapes, types, text entries and byte ranges, by name. Raises UserError for damaged files and unknown types."""
    with open(path, "rb") as file:
        reader = Reader(file, path)
        magic = reader.read(4)
        version = reader.number("I") if magic == MAGIC else None
        if version not in VERSIONS:
            raise UserError(
                "this is no GGUF file that can be read",
                where=path,
                got=f"{magic!r}, version {version}",
                expected=f"{MAGIC!r}, version {' or '.join(map(str, VERSIONS))}",
            )
        num_tensors, num_entries = reader.count("tensors"), reader.count("entries")
        entries = {}
        for _ in range(num_entries):
            key = reader.text()
            entries[key] = reader.value()
        tensors = dict(_tensors(reader, num_tensors, entries))
        alignment = entries.get(ALIGNMENT_KEY, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise UserError("this GGUF file's alignment cannot be", where=path, got=alignment)
        start = math.ceil(file.tell() / alignment) * alignment
        end = max((start + offset + size for _, _, offset, size in tensors.values()), default=start)
        if end > reader.size:
            raise UserError("the file is truncated", where=path, got=f"{reader.size} bytes", expected=f"{end} bytes", fix="download it again")
    texts = {key: value for key, value in entries.items() if isinstance(value, str)}
    return (
        {key: shape for key, (shape, *_) in tensors.items()},
        {key: name for key, (_, name, *_) in tensors.items()},
        texts,
        {key: (start + offset, start + offset + size) for key, (_, _, offset, size) in tensors.items()},
    )


def _tensors(reader: Reader, num_tensors: int, entries: dict) -> Iterator[tuple[str, tuple[tuple[int, ...], str, int, int]]]:
    """Yields each tensor's name, and its shape in torch's order, type, offset after the header and size in bytes."""
    for _ in range(num_tensors):
        name, num_dimensions = reader.text(), reader.number("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise UserError(
                "this GGUF file has a tensor of too many dimensions",
                where=reader.path,
                got=f"{name} with {num_dimensions}",
                expected=f"at most {MAX_DIMENSIONS}",
            )
        dims = [reader.number("Q") for _ in range(num_dimensions)]
        type_number, offset = reader.number("I"), reader.number("Q")
        if type_number not in TYPES:
            raise UserError(
                "this GGUF type cannot be read", where=reader.path, got=f"{name} as type {type_number}", expected=", ".join(t for t, *_ in TYPES.values())
            )
        num_elements, (label, block, size) = math.prod(dims), TYPES[type_number]
        shape = tuple(entries.get(SHAPE_KEY + name, dims[::-1]))
        if (dims or [1])[0] % block or any(not isinstance(side, int) for side in shape) or math.prod(shape) != num_elements:
            raise UserError(
                "this GGUF file's shapes do not hold together", where=reader.path, got=f"{name} of {shape} in {dims} as {label}", fix="download it again"
            )
        yield name, (shape, label, offset, num_elements // block * size)


def decode(data: np.ndarray, label: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """Bytes of a quantised tensor -> float32 of its shape. Raises UserError if the package gguf is missing or cannot read the type."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise UserError("quantised GGUF files need the package gguf", where=path, got=str(error), fix="pip install gguf") from error
    _, size = QUANTISED[label]
    try:
        values = dequantize(data.reshape(-1, size), GGMLQuantizationType[label])
    except (KeyError, NotImplementedError) as error:
        raise UserError("the package gguf that is installed cannot read this type", where=path, got=label, fix="pip install --upgrade gguf") from error
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(shape)
