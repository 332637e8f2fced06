"""Checkpoints of the DiT: files that carry their whole config and are checked strictly.

Key names of other implementations are data: one table per family, used in both directions.
"""

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..attention import AttentionFn, torch_attention
from ..config import MiVEConfig
from ..dit import MiVEDiT
from ..errors import UserError
from .float8 import MODES, Float8Linear
from .quantized import format_name
from .quantized_file import is_quantization_key, notes_of, read_dequantized, read_parts
from .quantized_linear import QuantizedLinear, multiplied_where_possible
from .safetensors_file import INDEX_SUFFIX, check_finite, family_of, read_headers, resolve, write_tensors
from .untrained import describe_untrained, untrained_parts

# key parts of the shared layers: Wan's, which are also ours -> those of diffusers' WanTransformer3DModel
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

T = TypeVar("T")


def rename_keys(keys: dict[str, T], table: dict[str, str], backwards: bool = False) -> dict[str, T]:
    """Renames keys of one family to the other's, each by the longest matching entry of the table; others keep their names."""
    pairs = [(b, a) if backwards else (a, b) for a, b in table.items()]
    renamed = {}
    for key, value in keys.items():
        old, new = max((pair for pair in pairs if pair[0] in key), key=lambda pair: len(pair[0]), default=("", ""))
        renamed[key.replace(old, new, 1) if old else key] = value
    return renamed


def save_dit(path: str | Path, state: dict[str, Tensor], config: MiVEConfig, dtype: torch.dtype | None = None, metadata: dict[str, str] | None = None) -> None:
    """Writes a MiVE DiT's weights to one safetensors file, with the whole config in its metadata. Raises UserError if one is not finite."""
    tensors = {k: v if dtype is None else v.to(dtype) for k, v in state.items()}
    check_finite(Path(path), tensors)
    write_tensors(Path(path), tensors, {**(metadata or {}), **config.to_metadata()})


def read_config(path: Path) -> MiVEConfig:
    """Reads the config of a MiVE checkpoint. Raises UserError for any other file, naming its kind."""
    headers = read_headers(path)
    metadata = {k: v for header in headers for k, v in header.metadata.items()}
    keys = [key for header in headers for key in header.shapes]
    family = family_of(keys)
    if family != "a MiVE DiT":
        missing = [k for k in ("context.fuse.weight", "context.projections.0.weight") if k not in keys]
        raise UserError(
            f"this looks like {family}", where=path, got=f"no {', '.join(missing)}", expected="a MiVE DiT", fix="a MiVE DiT is what `mive train` writes"
        )
    return MiVEConfig.from_metadata(metadata, where=path)


def load_dit(
    path: str | Path,
    *,
    operations=torch.nn,
    attention: AttentionFn,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    float8: str = "scaled_back",
    precise: tuple[str, ...] = (),
) -> MiVEDiT:
    """Loads a MiVE checkpoint (file, folder or sharded index) as a model in eval mode. Its keys must be exactly the model's.

    Tensors are loaded one at a time, so that no second copy of the model is held. `float8`, one of float8.MODES, selects how quantised
    matrices are handled: scaled back to `dtype` they save disk space only, kept or multiplied they save memory too. What the device cannot
    multiply is kept, with a warning. The modules `precise` are loaded in float32, whatever `dtype` and `float8` say.
    """
    if float8 not in MODES:
        raise UserError("unknown handling of 8 bits", where="float8", got=repr(float8), expected=", ".join(MODES))
    path = resolve(path, "dit.safetensors")
    config = read_config(path)
    headers = read_headers(path)
    files, notes = {key: file for file in headers for key in file.shapes}, notes_of(headers)
    check_dit_shapes(path, {key: file.shapes[key] for key, file in files.items()}, config)
    with torch.device("meta"):
        model = MiVEDiT(config, operations=operations, attention=attention, dtype=dtype)
    multiplied = float8 == "multiplied" and multiplied_where_possible(notes, device)
    state: dict[str, Tensor] = {}
    for key, file in files.items():
        layer = key.removesuffix(".weight")
        is_precise = key.split(".", 1)[0] in precise
        if key in notes and float8 != "scaled_back" and not is_precise and isinstance(model.get_submodule(layer), nn.Linear):
            parts, bias = {name: part.to(device) for name, part in read_parts(file, key).items()}, model.get_submodule(layer).bias
            if format_name(notes[key]) == "fp8" and parts.keys() == {"weight", "weight_scale"} and parts["weight_scale"].numel() == 1:
                parts["weight_scale"] = parts["weight_scale"].float().view(())
                model.set_submodule(layer, Float8Linear(parts["weight"], parts["weight_scale"], bias, multiplied))
            else:
                model.set_submodule(layer, QuantizedLinear(parts, notes[key], bias, multiplied and format_name(notes[key]) != "fp8"))
            state |= {f"{layer}.{name}": part for name, part in parts.items()}
        elif not is_quantization_key(key):
            state[key] = read_dequantized(file, key, torch.float32 if is_precise else dtype).to(device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def check_dit_shapes(path: Path, shapes: dict[str, tuple], config: MiVEConfig) -> None:
    """Raises UserError unless the file's keys and shapes are those of the config's DiT. Keys of 8-bit storage are ignored."""
    check_shapes(path, {k: v for k, v in shapes.items() if not is_quantization_key(k)}, state_dict_shapes(config))


def state_dict_shapes(config: MiVEConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the config's DiT, computed without allocating memory."""
    with torch.device("meta"):
        model = MiVEDiT(config, operations=torch.nn, attention=torch_attention)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def check_shapes(path: Path, got: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raises UserError unless both have the same keys and shapes."""
    missing, unexpected = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unexpected:
        raise UserError(
            "the keys do not fit the config in the file's metadata",
            where=path,
            got=f"{len(missing)} missing ({', '.join(missing[:3])}), {len(unexpected)} unexpected ({', '.join(unexpected[:3])})",
            expected=f"{len(expected)} keys",
        )
    wrong = next((k for k in expected if got[k] != expected[k]), None)
    if wrong is not None:
        raise UserError(f"{wrong} does not fit the config in the file's metadata", where=path, got=got[wrong], expected=expected[wrong])


def inspect(path: str | Path) -> dict:
    """Describes a file, or each file of a folder: family, config, layers, VLM, untrained modules, parameters, dtypes, bytes."""
    path = Path(path)
    if not path.exists():
        raise UserError("no such file or folder", where=path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".gguf") or p.name.endswith(INDEX_SUFFIX))
        if not found:
            raise UserError("the folder has no .safetensors or .gguf file", where=path)
        return {str(p.relative_to(path)): inspect(p) for p in found}
    headers = read_headers(path)
    shapes = {k: v for h in headers for k, v in h.shapes.items()}
    metadata = {k: v for h in headers for k, v in h.metadata.items()}
    dtypes = sorted({d for h in headers for d in h.dtypes.values()})
    report = {
        "family": family_of(shapes).split(" ", 1)[1],
        "tensors": len(shapes),
        "dtype": dtypes,
        "parameters": sum(torch.Size(s).numel() for s in shapes.values()),
        "bytes": sum(h.path.stat().st_size for h in headers),
    }
    if report["family"] == "MiVE DiT":
        config = MiVEConfig.from_metadata(metadata, where=path)
        report |= {"config": json.loads(config.to_metadata()["mive.config"]), "layers": list(config.layers), "vlm": config.vlm}
        if untrained := untrained_parts(path):
            report |= {"untrained": list(untrained), "note": describe_untrained(untrained)}
    extra = {k: v for k, v in metadata.items() if k not in ("mive.config", "format")}
    return report | ({"metadata": extra} if extra else {})
