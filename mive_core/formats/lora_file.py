"""LoRA files: adapters of the blocks' matrices, and whole-weight differences of the parts that a LoRA's training trains whole.

Written under peft's and ComfyUI's keys, so that stock loaders apply all of it. r rank.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ..config import METADATA_KEY, MiVEConfig
from ..errors import UserError
from .checkpoint import WAN_TO_DIFFUSERS, rename_keys
from .safetensors_file import TensorFile, check_finite, read_header, read_tensor, write_tensors

PREFIX = "diffusion_model."  # prefix of the DiT's weights in ComfyUI
# prefixes of layer names: ComfyUI and diffusion-pipe; full checkpoints; diffusers; PEFT (two); DiffSynth (none)
PREFIXES = (PREFIX, f"model.{PREFIX}", "transformer.", "base_model.model.", "base_model.model.transformer.", "")
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")  # kohya and musubi, Wan Fun, OneTrainer, SimpleTuner
LORA_KEY, BASE_KEY, BASE_CONFIG_KEY, NEW_PARTS_KEY = "mive.lora", "mive.base", "mive.base_config", "mive.new_parts"  # in the metadata
SAMPLING_KEY = "mive.sampling"  # what the base is to be sampled with under this LoRA, as JSON
SAMPLING_FIELDS: dict[str, type] = {"steps": int, "shift": float, "cfg": float}  # of MiVEConfig
MATRIX = re.compile(r"(?P<layer>.+)[._](?:lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?")
DOWN = re.compile(r"lora_A|lora[_.]down")
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias"}  # ending of a difference's key -> of the parameter's name
FLAT_BLOCK = re.compile(r"blocks_(\d+)_(.+)")
BLOCK_LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.norm_q", "self_attn.norm_k", "ffn.0", "ffn.2")
FLAT_LAYERS = {layer.replace(".", "_"): layer for layer in BLOCK_LAYERS} | {  # both spellings of a block's layers, without dots
    WAN_TO_DIFFUSERS[f".{layer}."].strip(".").replace(".", "_"): layer for layer in BLOCK_LAYERS
}
OTHER_LAYERS = ("time_embedding.0", "time_embedding.2", "time_projection.1", "head.head", "patch_embedding", "context.fuse")
FLAT_OTHERS = {
    name.rstrip(".").replace(".", "_"): layer for layer in OTHER_LAYERS for name in (layer, WAN_TO_DIFFUSERS.get(f"{layer}.", layer))
}  # the same of the layers outside of the blocks
FLAT_CONTEXT = re.compile(r"context_(norms|projections)_(\d+)")
UNKNOWN_KINDS = ("dora_scale", "lora_mid.weight")  # endings of keys without which the other matrices would give something else

T = TypeVar("T")


class Readers(Mapping[str, T]):
    """A mapping whose values are read from the file each time that they are looked up."""

    def __init__(self, readers: Mapping[str, Callable[[], T]]):
        self.readers = readers

    def __getitem__(self, key: str) -> T:
        return self.readers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __len__(self) -> int:
        return len(self.readers)


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA file; layers and parameters are named as in a MiVE checkpoint. Tensors are read when they are looked up."""

    adapters: Mapping[str, tuple[Tensor, Tensor]]  # layer -> A (r, in) and B (out, r) in float32; B A is the whole change, with scale and alpha in B
    differences: Mapping[str, Tensor]  # parameter -> float32 difference to the base's
    metadata: dict[str, str]
    unread: tuple[str, ...]  # keys of other kinds
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameter -> shape of its change; a convolution's adapter may say (out, in) alone
    keys: dict[str, str] = field(default_factory=dict)  # key in the file -> the parameter that it changes

    @property
    def base_config(self) -> MiVEConfig | None:
        """The config of the checkpoint that the LoRA was trained on; None if the file does not say."""
        text = self.metadata.get(BASE_CONFIG_KEY)
        return None if text is None else MiVEConfig.from_metadata({METADATA_KEY: text})


def sampling_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A LoRA's metadata -> the values of MiVEConfig's fields that a distilled one stands for; none for others. Raises UserError for what they cannot be."""
    text = metadata.get(SAMPLING_KEY)
    if text is None:
        return {}
    try:
        values = json.loads(text)
        found = {name: kind(values[name]) for name, kind in SAMPLING_FIELDS.items()}
        if min(found.values()) <= 0 or not all(map(math.isfinite, found.values())):
            raise ValueError(text)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError("the LoRA's sampling settings cannot be read", got=text[:80], fix="download it again") from error
    return found


def sampling_metadata(steps: int, shift: float, cfg: float) -> dict[str, str]:
    """Returns the metadata of a LoRA that is to be sampled so."""
    return {SAMPLING_KEY: json.dumps({"steps": steps, "shift": shift, "cfg": cfg})}


def lora_metadata(rank: int, base: str, config: MiVEConfig, new_parts: Iterable[str] = ()) -> dict[str, str]:
    """Returns the metadata of a LoRA trained on the checkpoint file `base` of that config; `new_parts` are the modules trained whole."""
    parts = ",".join(new_parts)
    metadata = {LORA_KEY: f"rank {rank}", BASE_KEY: base, BASE_CONFIG_KEY: config.to_metadata()[METADATA_KEY]}
    return metadata | ({NEW_PARTS_KEY: parts} if parts else {})


def write_lora(path: Path, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float, differences: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a LoRA under the keys that ComfyUI's stock loader applies; no loader needs an alpha.

    `adapters` maps layers to A (r, in) and B (out, r), and `scale`, alpha / rank, is multiplied into B: diffusion_model.blocks.0.self_attn.q.lora_A.weight.
    `differences` maps parameters to what is added to the base's: diffusion_model.context.fuse.diff for the weight, .diff_b for the bias.
    Raises UserError if a number is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in adapters.items():
        tensors |= {f"{PREFIX}{layer}.lora_A.weight": down, f"{PREFIX}{layer}.lora_B.weight": up.detach() * scale}
    tensors |= {PREFIX + difference_key(name): difference for name, difference in differences.items()}
    check_finite(path, tensors)
    write_tensors(path, tensors, {"format": "pt", **metadata})


def difference_key(parameter: str) -> str:
    """context.fuse.weight -> context.fuse.diff, context.fuse.bias -> context.fuse.diff_b; a parameter of another name is a layer of its own."""
    for ending, own in DIFFERENCES.items():
        if parameter.endswith(own):
            return parameter.removesuffix(own) + ending
    return f"{parameter}.diff"


def read_lora(path: str | Path) -> LoRAFile:
    """Reads a LoRA: peft's, diffusers' or kohya's names of matrices, with or without alpha, and differences. Raises UserError for other files."""
    path = Path(path)
    header = read_header(path)
    if not any(MATRIX.fullmatch(key) or key.endswith(tuple(DIFFERENCES)) for key in header.shapes):
        raise UserError(f"this looks like {header.family}", where=path, expected="a LoRA")
    unknown = next((key for key in header.shapes if key.endswith(UNKNOWN_KINDS)), None)
    if unknown:
        raise UserError("this LoRA is a DoRA or a LoCon with a third matrix", where=path, got=unknown, expected="two matrices for each layer")
    down: dict[str, str] = {}
    up: dict[str, str] = {}
    alphas, differences, keys = {}, {}, {}
    for key in header.shapes:
        ending = next((ending for ending in DIFFERENCES if key.endswith(ending)), None)
        if matrix := MATRIX.fullmatch(key):
            layer = layer_name(matrix["layer"])
            (down if DOWN.search(key, matrix.end("layer")) else up)[layer] = key
            keys[key] = f"{layer}.weight"
        elif key.endswith(".alpha"):
            layer = layer_name(key.removesuffix(".alpha"))
            alphas[layer], keys[key] = float(read_tensor(header, key)), f"{layer}.weight"
        elif ending:
            layer = layer_name(key.removesuffix(ending))
            keys[key] = layer if layer.endswith("modulation") else layer + DIFFERENCES[ending]
            differences[keys[key]] = key
    for layer in down.keys() ^ up.keys():
        raise UserError("the LoRA is not whole", where=path, got=f"one matrix of {layer}", expected="two", fix="download it again")
    shapes = {f"{layer}.weight": (header.shapes[up[layer]][0], *header.shapes[key][1:]) for layer, key in down.items()}
    shapes |= {parameter: header.shapes[key] for parameter, key in differences.items()}
    return LoRAFile(
        Readers({layer: partial(read_adapter, header, key, up[layer], alphas.get(layer)) for layer, key in down.items()}),
        Readers({parameter: partial(_read_float, header, key) for parameter, key in differences.items()}),
        header.metadata,
        tuple(key for key in header.shapes if key not in keys),
        shapes,
        keys,
    )


def read_adapter(file: TensorFile, down: str, up: str, alpha: float | None) -> tuple[Tensor, Tensor]:
    """Reads A and B, in float32, with the scale alpha / r multiplied into B."""
    a, b = _read_float(file, down), _read_float(file, up)
    return a, b if alpha is None else b * (alpha / len(a))


def _read_float(file: TensorFile, key: str) -> Tensor:
    return read_tensor(file, key).float()


def lora_key_map(keys: Iterable[str]) -> dict[str, str]:
    """ComfyUI's weight keys -> a map from every layer name that LoRAs use to the weight key it changes. `layer_name` reads the same names."""
    targets: dict[str, str] = {}
    for key in keys:
        wan = key.removeprefix(PREFIX)
        (diffusers,) = rename_keys({wan: None}, WAN_TO_DIFFUSERS)
        for name in (wan.removesuffix(".weight"), diffusers.removesuffix(".weight")):
            targets |= {prefix + name: key for prefix in PREFIXES} | {prefix + name.replace(".", "_"): key for prefix in FLAT_PREFIXES}
    return targets


def layer_name(name: str) -> str:
    """A layer's name in a LoRA file -> its name in a MiVE or Wan checkpoint, from which layers of neither keep theirs without prefix."""
    for prefix in sorted(FLAT_PREFIXES, key=len, reverse=True):
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            block = FLAT_BLOCK.fullmatch(flat)
            context = FLAT_CONTEXT.fullmatch(flat)
            if context:
                return f"context.{context[1]}.{context[2]}"
            return f"blocks.{block[1]}.{FLAT_LAYERS.get(block[2], block[2])}" if block else FLAT_OTHERS.get(flat, flat)
    name = name.removeprefix(next(prefix for prefix in sorted(PREFIXES, key=len, reverse=True) if name.startswith(prefix)))
    (wan,) = rename_keys({f"{name}.": None}, WAN_TO_DIFFUSERS, backwards=True)
    return wan.removesuffix(".")
