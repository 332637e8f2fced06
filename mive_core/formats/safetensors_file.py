"""Reads the headers of safetensors files, checks that files are complete, and writes them.

The kind of model is identified before any tensor is read; pickles are never opened.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..config import METADATA_PREFIX
from ..errors import UserError
from ..media.paths import atomic_write, check_input, remove_partials_of
from . import gguf_file

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
ARCHIVE_MAGIC = (b"PK", b"\x80\x02")
CHUNK = 2**24  # bytes per copy where the system has no file-to-file copy
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})
GLOBAL_SCALE = ".weight_scale_2"  # of a 4-bit weight, two entries in a byte

VLM_FAMILY, VAE_FAMILY, WAN_FAMILY = "a Qwen3-VL model", "a Wan VAE", "a Wan T2V checkpoint"
WAN_I2V_FAMILY = "a Wan I2V checkpoint"
# name of a family, pattern of a key that only its files have; most specific first
FAMILIES = (
    ("a MiVE DiT", r"^context\.projections\.0\.weight$"),
    ("a LoRA", r"lora_(A|B|up|down|a|b)\b|\.lora_"),
    ("a Wan VACE checkpoint", r"(^|\.)vace_(blocks|patch_embedding)\."),
    ("a Wan S2V checkpoint", r"(^|\.)casual_audio_encoder\."),
    ("a Wan Animate checkpoint", r"(^|\.)(face_adapter|pose_patch_embedding)\."),
    ("a HuMo checkpoint", r"(^|\.)audio_proj\.audio_proj_glob_1\."),
    ("a SCAIL or WanDancer checkpoint", r"(^|\.)patch_embedding_(pose|mask|global)\."),
    ("a Wan Control-Camera checkpoint", r"(^|\.)control_adapter\."),
    (WAN_I2V_FAMILY, r"img_emb\.proj|image_embedder\."),
    (WAN_FAMILY, r"(^|\.)blocks\.0\.(cross_attn|attn2)\."),
    (VAE_FAMILY, r"^(decoder\.middle\.0\.residual\.0\.gamma|decoder\.mid_block\.resnets\.0\.norm1\.gamma|decoder\.head\.0\.gamma)$"),
    (VLM_FAMILY, r"(visual\.deepstack_merger_list|visual\.merger)"),
    ("a language model", r"(^|\.)layers\.0\.self_attn\.q_proj\.weight$"),
)


@dataclass(frozen=True)
class TensorFile:
    """The header of a safetensors or GGUF file: names, shapes and dtypes, with no tensor read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    offsets: dict[str, tuple[int, int]]  # byte range of each tensor in the file: start, end (exclusive)

    @property
    def family(self) -> str:
        """The kind of model, in words."""
        return family_of(self.shapes)


@dataclass(frozen=True)
class FileBytes:
    """The byte range of a tensor in a file, to be copied unchanged."""

    path: Path
    start: int
    end: int  # exclusive


def family_of(keys: Iterable[str]) -> str:
    """Identifies the kind of model by its keys; returns it in words."""
    keys = list(keys)
    for name, pattern in FAMILIES:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "an unknown model"


def resolve(path: str | Path, default_name: str) -> Path:
    """A file, or a folder with `default_name` (or its sharded index) in it -> the file. Raises UserError if there is none."""
    path = check_input(path, default_name)
    if path.is_dir():
        for name in (default_name, default_name.removesuffix(".safetensors") + INDEX_SUFFIX):
            if (path / name).is_file():
                return path / name
        raise UserError(f"the folder has no {default_name}", where=path, got=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder")
    return path


def read_header(path: Path) -> TensorFile:
    """Reads and checks the header of a safetensors or GGUF file. Raises UserError for pickles, web pages, archives and truncated files."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            "pickle files are never opened, because opening one runs its code", where=path, expected="a .safetensors file", fix="convert it with its own tool"
        )
    if path.suffix.lower() == gguf_file.SUFFIX:
        return TensorFile(path, *gguf_file.read_gguf_header(path))
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(512)
        header_size = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        # a header's size may begin with any two bytes, even those of an archive
        if head[8:9] != b"{" or not 2 <= header_size <= MAX_HEADER_BYTES:
            kind = "a zip archive or a pickle" if head[:2] in ARCHIVE_MAGIC else "a web page" if head.lstrip()[:1] == b"<" else "no safetensors file"
            raise UserError(f"this is {kind}", where=path, got=f"{size} bytes", expected="a .safetensors file", fix="download it again")
        if header_size + 8 > size:
            raise UserError("the file is truncated", where=path, got=f"{size} bytes", expected=f"at least {header_size + 8} bytes", fix="download it again")
        file.seek(8)
        try:
            header = json.loads(file.read(header_size))
            metadata = header.pop("__metadata__", {})
            _check_entries(header, metadata)
        except (ValueError, RecursionError) as error:
            raise UserError("the safetensors header cannot be read", where=path, got=str(error), fix="download it again") from error
    expected = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != size:
        raise UserError(
            "the file is truncated" if size < expected else "the file is longer than its header says",
            where=path,
            got=f"{size} bytes",
            expected=f"{expected} bytes",
            fix="download it again",
        )
    data_start = 8 + header_size
    offsets = {k: (data_start + v["data_offsets"][0], data_start + v["data_offsets"][1]) for k, v in header.items()}
    for key in [key for key, entry in header.items() if key.startswith(METADATA_PREFIX) and entry["dtype"] == "U8"]:
        # written by hosts that use the metadata themselves
        start, end = offsets.pop(key)
        metadata = {**metadata, key: np.fromfile(path, np.uint8, end - start, offset=start).tobytes().decode("utf-8", "replace")}
        del header[key]
    shapes = {k: tuple(v["shape"]) for k, v in header.items()}
    for key in (key.removesuffix(GLOBAL_SCALE) + ".weight" for key in header if key.endswith(GLOBAL_SCALE)):
        if header.get(key, {}).get("dtype") == "U8" and len(shapes[key]) == 2:
            shapes[key] = (shapes[key][0], 2 * shapes[key][1])
    return TensorFile(path, shapes, {k: v["dtype"] for k, v in header.items()}, metadata, offsets)


def _check_entries(header: dict, metadata: object) -> None:
    """Raises ValueError unless each tensor has a dtype, a shape and a range of bytes, and the metadata is text."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is no text")
    for key, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        lists = [entry.get(name) for name in ("shape", "data_offsets")]
        if not all(isinstance(items, list) and all(type(item) is int and item >= 0 for item in items) for items in lists):
            raise ValueError(f"no shape or range of bytes of {key!r}")
        if not isinstance(entry.get("dtype"), str) or len(entry["data_offsets"]) != 2 or entry["data_offsets"][0] > entry["data_offsets"][1]:
            raise ValueError(f"no dtype or a range of bytes of {key!r} that cannot be")


def shard_files(path: Path) -> list[Path]:
    """A file, or a sharded index -> the files that hold the tensors. Raises UserError for a damaged index, and one that names a missing shard."""
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    try:
        shards = [path.parent / name for name in sorted(set(json.loads(path.read_bytes())["weight_map"].values()))]
        if not shards or any("\0" in str(shard) for shard in shards):
            raise ValueError("no shards, or a NUL in the name of one")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError("the index of the shards is damaged", where=path, got=str(error), fix="download it again") from None
    for shard in shards:
        if shard.parent.resolve() != path.parent.resolve():
            raise UserError("a shard lies outside the model's folder", where=path, got=shard.name)
        if not shard.is_file():
            raise UserError("a shard is missing", where=path, got=f"no {shard.name}", expected=f"{len(shards)} shards", fix="download it again")
    return shards


def read_headers(path: Path) -> list[TensorFile]:
    """The header of a file, or those of all shards of a sharded index."""
    return [read_header(shard) for shard in shard_files(path)]


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, or of all shards of a sharded index."""
    return {key: value for header in read_headers(path) for key, value in header.metadata.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or a sharded index, in the file's dtypes."""
    tensors: dict[str, Tensor] = {}
    for shard in read_headers(path):
        try:
            with safe_open(shard.path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in shard.shapes})
        except SafetensorError as error:
            raise UserError("the file cannot be read", where=shard.path, got=str(error), fix="download it again") from error
    return tensors


def read_tensor(file: TensorFile, key: str) -> Tensor:
    """Reads one tensor in the file's dtype; quantised GGUF tensors become float32. Raises UserError for unknown dtypes.

    Only the tensor's bytes are read, and the file is not memory-mapped.
    """
    label = file.dtypes[key]
    dtype, quantised = DTYPES.get(label), label in gguf_file.QUANTISED and file.path.suffix.lower() == gguf_file.SUFFIX
    if dtype is None and not quantised:
        raise UserError("this dtype cannot be read", where=file.path, got=f"{key} as {file.dtypes[key]}", expected=", ".join(DTYPES))
    data = read_bytes(file, key)
    return gguf_file.decode(data, label, file.shapes[key], file.path) if quantised else torch.from_numpy(data).view(dtype).view(file.shapes[key])


def read_bytes(file: TensorFile, key: str) -> np.ndarray:
    """Reads a tensor as the file stores it, (N,) uint8."""
    start, end = file.offsets[key]
    return np.fromfile(file.path, np.uint8, end - start, offset=start)


def file_bytes(file: TensorFile, key: str) -> FileBytes:
    """The byte range of a tensor."""
    return FileBytes(file.path, *file.offsets[key])


def stream_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    produce: Callable[[str], Tensor | FileBytes],
    metadata: dict[str, str],
    show_progress: bool = True,
) -> None:
    """Writes a safetensors file, completely or not at all, with one tensor at a time in memory, as returned by produce(key).

    FileBytes are copied from file to file. `layout` holds the dtype and shape of each tensor. Raises UserError if the system
    refuses the write, or if the disk lacks space.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for key, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials_of(path)  # of gigabytes, where an earlier run was killed
    free = shutil.disk_usage(path.parent).free
    if free < end:
        raise UserError("there is no room for the file", where=path, got=f"{free / 1e9:.1f} GB free", expected=f"{end / 1e9:.1f} GB")
    with atomic_write(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, (dtype, shape) in tqdm(layout.items(), desc=path.name, unit="tensor", disable=not show_progress):
            tensor = produce(key)
            if isinstance(tensor, FileBytes):
                if tensor.end - tensor.start != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{key}: {tensor.end - tensor.start} bytes where {dtype} of {tuple(shape)} was announced")
                copy_bytes(tensor, file)
                continue
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{key}: {tuple(tensor.shape)} where {tuple(shape)} was announced")
            file.write(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy())


def copy_bytes(origin: FileBytes, file: BinaryIO) -> None:
    """Appends bytes of another file, by a system call if possible. Raises UserError if that file ends early."""
    file.flush()
    position = origin.start
    with open(origin.path, "rb") as source:
        while position < origin.end:
            try:
                copied = os.copy_file_range(source.fileno(), file.fileno(), origin.end - position, position)
            except (AttributeError, OSError):  # other systems, or files on different file systems
                source.seek(position)
                copied = file.write(source.read(min(origin.end - position, CHUNK)))
                file.flush()
            if not copied:
                raise UserError("the file is truncated", where=origin.path, got=f"{position} bytes", expected=f"{origin.end} bytes", fix="download it again")
            position += copied


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError if a tensor holds a NaN or an infinity, as one of float16 does where its numbers were above 65504."""
    for key, tensor in tensors.items():
        values = tensor.detach()
        values = values.float() if values.is_floating_point() and values.dtype.itemsize == 1 else values  # torch knows no isfinite of float8
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise UserError(
                "a weight is not finite, so nothing is written", where=path, got=f"{key} in {tensor.dtype}", fix="take bf16 or fp32 instead of fp16"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, completely or not at all, largest dtypes first. Raises UserError as stream_tensors does.

    The file has the permissions that open() gives; safetensors' own save_file makes it readable by its owner only.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in ordered.items()}
    stream_tensors(path, layout, lambda key: ordered[key].detach().cpu(), metadata, show_progress=False)
