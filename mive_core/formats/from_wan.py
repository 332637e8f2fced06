"""A Wan 2.1 text-to-video checkpoint becomes a MiVE one: shared layers copied, cross-attention left out, the rest initialised.

The original layout, ComfyUI's single files and diffusers' folders are read, in 16 or 32 bits or scaled fp8,
one tensor at a time. C latent channels, D model width.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import VLM_SIZES, MiVEConfig
from ..errors import UserError
from ..layers import parse_layers
from ..media.paths import check_input
from .checkpoint import WAN_TO_DIFFUSERS, check_fit, rename, shapes_of
from .safetensors_file import (
    DTYPES,
    WAN_FAMILY,
    FileBytes,
    TensorFile,
    family_of,
    file_bytes,
    is_scale,
    read_dequantized,
    read_headers,
    resolve,
    stream_tensors,
)

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of whole ComfyUI checkpoints
LEFT_OUT = re.compile(r"(^|\.)(cross_attn|attn2|norm3|norm2|text_embedding|condition_embedder\.text_embedder)\.")
HEAD_DIM = 128  # of every published Wan
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
SEED = 0  # of the condition tokens' projection


def init_from_wan(
    source: str | Path,
    destination: str | Path,
    *,
    layers: str = "first+last",
    vlm: str = "8b",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MiVEConfig:
    """Reads a Wan2.1-T2V file, sharded index or diffusers folder, writes one MiVE file, returns its config.

    `dtype` None keeps the source's; fp8 and what GGUF has quantised become bf16. Holds one tensor at a time, and tells `progress` which of how many it is at;
    where that raises, no file is left. Raises UserError for anything that is no whole Wan T2V.
    """
    path = find_wan(source)
    where = locate(path)
    shapes = {key: file.shapes[name] for key, (file, name) in where.items()}
    config = config_of(path, shapes, layers, vlm)
    wanted = shapes_of(config)
    fresh = {key for key in wanted if key.startswith("context.")}
    double = "patch_embedding.weight"
    copied = {key: shape for key, shape in wanted.items() if key not in fresh}
    single = (shapes[double][0], 2 * shapes[double][1], *shapes[double][2:])
    check_fit(path, {**{k: v for k, v in shapes.items() if not LEFT_OUT.search(k)}, double: single}, copied)
    if dtype is None:
        kinds = {file.dtypes[name] for file, name in where.values()}
        dtype = torch.bfloat16 if kinds - {"F16", "F32"} else torch.float16 if "F16" in kinds else torch.float32
    generator = torch.Generator().manual_seed(SEED)

    places = {key: i for i, key in enumerate(wanted)}

    def produce(key: str) -> Tensor | FileBytes:
        if progress is not None:
            progress(places[key], len(places))
        if key in fresh:
            return fresh_tensor(key, wanted[key], generator)
        file, name = where[key]
        if key != double and DTYPES.get(file.dtypes[name]) == dtype:
            return file_bytes(file, name)
        tensor = read_dequantized(file, name, dtype).view(shapes[key])
        return torch.cat([tensor, torch.zeros_like(tensor)], dim=1) if key == double else tensor

    stream_tensors(Path(destination), {key: (dtype, shape) for key, shape in wanted.items()}, produce, config.to_metadata())
    return config


def find_wan(source: str | Path) -> Path:
    """A file, a sharded index, or a folder as diffusers lays it out -> the file or the index. Raises UserError where there is none."""
    path = check_input(source, "Wan checkpoint")
    if not path.is_dir():
        return path
    return resolve(path / "transformer" if (path / "transformer").is_dir() else path, DIFFUSERS_FILE)


def locate(path: Path) -> dict[str, tuple[TensorFile, str]]:
    """Wan's own key -> the file that holds it, and its key there; keys of 8-bit storage are left out. Raises UserError for other models."""
    headers = read_headers(path)
    found = {name: (file, name) for file in headers for name in file.shapes}
    family = family_of(found)
    if family != WAN_FAMILY:
        raise UserError(f"this looks like {family}", where=path, expected=f"{WAN_FAMILY}, 1.3B or 14B")
    found = {_bare(name): place for name, place in found.items() if not is_scale(name)}
    if any(".attn1." in name for name in found):
        found = rename(found, WAN_TO_DIFFUSERS, backwards=True)
    return found


def config_of(path: Path, shapes: dict[str, tuple[int, ...]], layers: str, vlm: str) -> MiVEConfig:
    """Shapes by Wan's keys -> the config. Raises UserError where the file is not whole or the VLM is unknown."""
    if vlm not in VLM_SIZES:
        raise UserError("unknown VLM", where="vlm", got=vlm, expected=", ".join(VLM_SIZES))
    vlm_width, vlm_layers = VLM_SIZES[vlm]
    try:
        width, channels = shapes["patch_embedding.weight"][:2]
        ffn_width, freq_dim = shapes["blocks.0.ffn.0.weight"][0], shapes["time_embedding.0.weight"][1]
    except KeyError as error:
        raise UserError("the checkpoint is not whole", where=path, got=f"no {error.args[0]}", fix="download it again") from error
    if channels != 16:
        raise UserError("this Wan is not made for text to video", where=path, got=f"{channels} input channels", expected="16 (Wan2.1-T2V)")
    num_blocks = 1 + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match)
    return MiVEConfig(
        width=width,
        num_heads=max(width // HEAD_DIM, 1),
        ffn_width=ffn_width,
        num_blocks=num_blocks,
        freq_dim=freq_dim,
        vlm=f"Qwen3-VL-{vlm.upper()}",
        vlm_width=vlm_width,
        vlm_num_layers=vlm_layers,
        layers=parse_layers(layers, vlm_layers),
    )


def fresh_tensor(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of the condition tokens' projection: norms at one, biases at zero, Xavier for matrices."""
    if ".norms." in f".{key}":
        return torch.ones(shape)
    tensor = torch.zeros(shape)
    return nn.init.xavier_uniform_(tensor, generator=generator) if tensor.ndim == 2 else tensor


def _bare(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
