"""LoRA files: adapters of the blocks' matrices, and whole-weight differences of the parts that a LoRA's training trains whole.

Written under peft's and ComfyUI's keys, so that stock loaders apply all of it. r rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..config import METADATA_KEY, MiVEConfig
from ..errors import UserError
from .checkpoint import WAN_TO_DIFFUSERS, rename_keys
from .safetensors_file import check_finite, read_header, read_tensors, write_tensors

PREFIX = "diffusion_model."  # prefix of the DiT's weights in ComfyUI
# prefixes of layer names: ComfyUI and diffusion-pipe; full checkpoints; diffusers; PEFT (two); DiffSynth (none)
PREFIXES = (PREFIX, f"model.{PREFIX}", "transformer.", "base_model.model.", "base_model.model.transformer.", "")
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")  # kohya and musubi, Wan Fun, OneTrainer, SimpleTuner
LORA_KEY, BASE_KEY, BASE_CONFIG_KEY, NEW_PARTS_KEY = "mive.lora", "mive.base", "mive.base_config", "mive.new_parts"  # in the metadata
MATRIX = re.compile(r"(?P<layer>.+)[._](?:lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up)(?:\.default)?(?:\.weight)?")
DOWN = re.compile(r"lora_A|lora[_.]down")
DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias"}  # ending of a difference's key -> of the parameter's name
FLAT_BLOCK = re.compile(r"blocks_(\d+)_(.+)")
BLOCK_LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "self_attn.norm_q", "self_attn.norm_k", "ffn.0", "ffn.2")
FLAT_LAYERS = {layer.replace(".", "_"): layer for layer in BLOCK_LAYERS} | {  # both spellings of a block's layers, without dots
    WAN_TO_DIFFUSERS[f".{layer}."].strip(".").replace(".", "_"): layer for layer in BLOCK_LAYERS
}


@dataclass(frozen=True)
class LoRAFile:
    """The content of a LoRA file; layers and parameters are named as in a MiVE checkpoint."""

    adapters: dict[str, tuple[Tensor, Tensor]]  # layer -> A (r, in) and B (out, r) in float32; B A is the whole change, with scale and alpha in B
    differences: dict[str, Tensor]  # parameter -> float32 difference to the base's
    metadata: dict[str, str]
    unread: tuple[str, ...]  # keys of other kinds

    @property
    def base_config(self) -> MiVEConfig | None:
        """The config of the checkpoint that the LoRA was trained on; None if the file does not say."""
        text = self.metadata.get(BASE_CONFIG_KEY)
        return None if text is None else MiVEConfig.from_metadata({METADATA_KEY: text})


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
    tensors = read_tensors(path)
    if any(key.endswith("dora_scale") for key in tensors):
        raise UserError("this LoRA is a DoRA, which scales whole weights besides", where=path, expected="a LoRA without dora_scale")
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    alphas, differences, unread = {}, {}, []
    for key, tensor in tensors.items():
        ending = next((ending for ending in DIFFERENCES if key.endswith(ending)), None)
        if matrix := MATRIX.fullmatch(key):
            (down if DOWN.search(key, matrix.end("layer")) else up)[layer_name(matrix["layer"])] = tensor.float()
        elif key.endswith(".alpha"):
            alphas[layer_name(key.removesuffix(".alpha"))] = float(tensor)
        elif ending:
            layer = layer_name(key.removesuffix(ending))
            differences[layer if layer.endswith("modulation") else layer + DIFFERENCES[ending]] = tensor.float()
        else:
            unread.append(key)
    for layer in down.keys() ^ up.keys():
        raise UserError("the LoRA is not whole", where=path, got=f"one matrix of {layer}", expected="two", fix="download it again")
    adapters = {layer: (a, up[layer] * (alphas[layer] / len(a) if layer in alphas else 1.0)) for layer, a in down.items()}
    return LoRAFile(adapters, differences, header.metadata, tuple(unread))


def layer_name(name: str) -> str:
    """A layer's name in a LoRA file -> its name in a MiVE or Wan checkpoint, from which layers of neither keep theirs without prefix."""
    for prefix in sorted(FLAT_PREFIXES, key=len, reverse=True):
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            block = FLAT_BLOCK.fullmatch(flat)
            return f"blocks.{block[1]}.{FLAT_LAYERS.get(block[2], block[2])}" if block else flat
    name = name.removeprefix(next(prefix for prefix in sorted(PREFIXES, key=len, reverse=True) if name.startswith(prefix)))
    (wan,) = rename_keys({f"{name}.": None}, WAN_TO_DIFFUSERS, backwards=True)
    return wan.removesuffix(".")
