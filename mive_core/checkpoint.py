"""Checkpoints: safetensors files that say what they are, read strictly, and named when they are something else.

Foreign key names are data: one table per family, read in both directions.
"""

import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .attention import AttentionFn
from .config import MiVEConfig
from .dit import MiVEDiT
from .errors import UserError

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

# Wan's and our spelling of the shared layers -> diffusers' WanTransformer3DModel
WAN_TO_DIFFUSERS = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
    ".self_attn.q.": ".attn1.to_q.",
    ".self_attn.k.": ".attn1.to_k.",
    ".self_attn.v.": ".attn1.to_v.",
    ".self_attn.o.": ".attn1.to_out.0.",
    ".self_attn.norm_q.": ".attn1.norm_q.",
    ".self_attn.norm_k.": ".attn1.norm_k.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".modulation": ".scale_shift_table",
}

# a family's name and a key that only its files have, most specific first
FAMILIES = (
    ("a MiVE DiT", r"^context\.projections\.0\.weight$"),
    ("a LoRA", r"lora_(A|B|up|down|a|b)\b|\.lora_"),
    ("a Wan I2V checkpoint", r"img_emb\.proj|image_embedder\."),
    ("a Wan T2V checkpoint", r"(^|\.)blocks\.0\.(cross_attn|attn2)\."),
    ("a Wan VAE", r"^(decoder\.middle\.0\.residual\.0\.gamma|decoder\.mid_block\.resnets\.0\.norm1\.gamma|decoder\.head\.0\.gamma)$"),
    ("a Qwen3-VL model", r"(visual\.deepstack_merger_list|visual\.merger)"),
    ("a language model", r"(^|\.)layers\.0\.self_attn\.q_proj\.weight$"),
)


def rename(keys: dict[str, Tensor], table: dict[str, str], backwards: bool = False) -> dict[str, Tensor]:
    """Keys of one family -> the other's, by the longest entry of the table that fits; others keep their names."""
    pairs = [(b, a) if backwards else (a, b) for a, b in table.items()]
    renamed = {}
    for key, value in keys.items():
        old, new = max((pair for pair in pairs if pair[0] in key), key=lambda pair: len(pair[0]), default=("", ""))
        renamed[key.replace(old, new, 1) if old else key] = value
    return renamed


@dataclass(frozen=True)
class TensorFile:
    """The outside of a safetensors file: names, shapes and dtypes, with no tensor read."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]

    @property
    def family(self) -> str:
        """What kind of model the keys belong to, in words."""
        return family_of(self.shapes)


def family_of(keys) -> str:
    for name, pattern in FAMILIES:
        if any(re.search(pattern, key) for key in keys):
            return name
    return "an unknown model"


def resolve(path: str | Path, default_name: str) -> Path:
    """A file, or a folder with `default_name` (or its sharded index) in it -> the file. Raises UserError where there is none."""
    path = Path(path)
    if "\0" in str(path):
        raise UserError("the path contains a NUL character", got=repr(str(path)))
    if path.is_dir():
        for name in (default_name, default_name.removesuffix(".safetensors") + INDEX_SUFFIX):
            if (path / name).is_file():
                return path / name
        raise UserError(f"the folder has no {default_name}", where=path, got=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder")
    if not path.is_file():
        raise UserError("no such file", where=path, fix=f"expected a {default_name} or a folder with one")
    return path


def read_header(path: Path) -> TensorFile:
    """Checks a safetensors file from the outside. Raises UserError for pickles, pages, archives and truncated files."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError("pickle files are never opened, because opening one runs its code", where=path,
                        expected="a .safetensors file", fix="convert it with its own tool")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(512)
        header_size = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if start.startswith(b"PK\x03\x04") or start.startswith(b"\x80\x02") or start.lstrip()[:1] == b"<" or not 2 <= header_size:
            kind = ("a zip archive or a pickle" if start[:2] in (b"PK", b"\x80\x02") else "a web page" if start.lstrip()[:1] == b"<" else "no safetensors file")
            raise UserError(f"this is {kind}", where=path, got=f"{size} bytes", expected="a .safetensors file", fix="download it again")
        if header_size + 8 > size:
            raise UserError("the file is truncated", where=path, got=f"{size} bytes", expected=f"at least {header_size + 8} bytes", fix="download it again")
        file.seek(8)
        try:
            header = json.loads(file.read(header_size))
        except ValueError as error:
            raise UserError("the safetensors header cannot be read", where=path, got=str(error), fix="download it again") from error
    metadata = header.pop("__metadata__", {})
    expected = 8 + header_size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected != size:
        raise UserError("the file is truncated" if size < expected else "the file is longer than its header says", where=path,
                        got=f"{size} bytes", expected=f"{expected} bytes", fix="download it again")
    return TensorFile(path, {k: tuple(v["shape"]) for k, v in header.items()}, {k: v["dtype"] for k, v in header.items()}, metadata)


def shard_files(path: Path) -> list[Path]:
    """A file, or a sharded index -> the files that hold the tensors. Raises UserError naming a missing shard."""
    if not path.name.endswith(INDEX_SUFFIX):
        return [path]
    index = json.loads(path.read_text())
    shards = [path.parent / name for name in sorted(set(index["weight_map"].values()))]
    for shard in shards:
        if shard.parent.resolve() != path.parent.resolve():
            raise UserError("a shard lies outside the model's folder", where=path, got=shard.name)
        if not shard.is_file():
            raise UserError("a shard is missing", where=path, got=f"no {shard.name}", expected=f"{len(shards)} shards", fix="download it again")
    return shards


def read_headers(path: Path) -> list[TensorFile]:
    """The outside of a file, or of every shard of a sharded index."""
    return [read_header(shard) for shard in shard_files(path)]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or a sharded index, in the file's dtypes."""
    tensors = {}
    for shard in read_headers(path):
        try:
            with safe_open(shard.path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})
        except SafetensorError as error:
            raise UserError("the file cannot be read", where=shard.path, got=str(error), fix="download it again") from error
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes beside and renames: a reader finds the old file or the new one, whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, beside, metadata=metadata)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_dit(path: str | Path, state: dict[str, Tensor], config: MiVEConfig, dtype: torch.dtype | None = None,
             metadata: dict[str, str] | None = None) -> None:
    """A MiVE DiT's weights -> one safetensors file whose metadata carries the whole config."""
    tensors = {k: v if dtype is None else v.to(dtype) for k, v in state.items()}
    write_tensors(Path(path), tensors, {**(metadata or {}), **config.to_metadata()})


def read_config(path: Path) -> MiVEConfig:
    """The config of a MiVE checkpoint. Raises UserError that names what the file is, where it is something else."""
    headers = read_headers(path)
    metadata = {k: v for header in headers for k, v in header.metadata.items()}
    keys = [key for header in headers for key in header.shapes]
    family = family_of(keys)
    if family != "a MiVE DiT":
        missing = [k for k in ("context.fuse.weight", "context.projections.0.weight") if k not in keys]
        raise UserError(f"this looks like {family}", where=path, got=f"no {', '.join(missing)}", expected="a MiVE DiT",
                        fix="a MiVE DiT is what `mive train` writes")
    return MiVEConfig.from_metadata(metadata, where=path)


def load_dit(path: str | Path, *, operations=torch.nn, attention: AttentionFn, dtype: torch.dtype = torch.float32,
             device: torch.device | str = "cpu") -> MiVEDiT:
    """A MiVE checkpoint (file, folder or sharded index) -> the model, in eval mode. Every key must fit, and no other be there."""
    path = resolve(path, "dit.safetensors")
    config = read_config(path)
    with torch.device("meta"):
        model = MiVEDiT(config, operations=operations, attention=attention, dtype=dtype)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    tensors = read_tensors(path)
    check_fit(path, {k: tuple(v.shape) for k, v in tensors.items()}, shapes)
    model.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in tensors.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def check_fit(path: Path, got: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raises UserError unless both have the same keys and shapes."""
    missing, unexpected = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unexpected:
        raise UserError("the keys do not fit the config in the file's metadata", where=path,
                        got=f"{len(missing)} missing ({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])})",
                        expected=f"{len(expected)} keys")
    wrong = next((k for k in expected if got[k] != expected[k]), None)
    if wrong is not None:
        raise UserError(f"{wrong} does not fit the config in the file's metadata", where=path, got=got[wrong], expected=expected[wrong])


def inspect(path: str | Path) -> dict:
    """What a file, or each file of a folder, is: family, config, layers, VLM, parameters, dtypes, bytes."""
    path = Path(path)
    if not path.exists():
        raise UserError("no such file or folder", where=path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors",) or p.name.endswith(INDEX_SUFFIX))
        if not found:
            raise UserError("the folder has no .safetensors file", where=path)
        return {str(p.relative_to(path)): inspect(p) for p in found}
    headers = read_headers(path)
    shapes = {k: v for h in headers for k, v in h.shapes.items()}
    metadata = {k: v for h in headers for k, v in h.metadata.items()}
    dtypes = sorted({d for h in headers for d in h.dtypes.values()})
    report = {"family": family_of(shapes).split(" ", 1)[1], "tensors": len(shapes), "dtype": dtypes,
              "parameters": sum(torch.Size(s).numel() for s in shapes.values()), "bytes": sum(h.path.stat().st_size for h in headers)}
    if report["family"] == "MiVE DiT":
        config = MiVEConfig.from_metadata(metadata, where=path)
        report |= {"config": json.loads(config.to_metadata()["mive.config"]), "layers": list(config.layers), "vlm": config.vlm}
    extra = {k: v for k, v in metadata.items() if k not in ("mive.config", "format")}
    return report | ({"metadata": extra} if extra else {})
