"""Converts a Wan 2.1 text-to-video checkpoint to a MiVE one: shared layers are copied, cross-attention is dropped, the rest initialised.

Reads the original layout, ComfyUI's single files and diffusers' folders, in 16 or 32 bits or scaled fp8,
one tensor at a time. C latent channels, D model width.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PRESETS, VLM_SIZES, MiVEConfig
from ..errors import UserError
from ..layers import parse_layers
from ..media.paths import check_input
from .checkpoint import WAN_TO_DIFFUSERS, check_shapes, rename_keys, state_dict_shapes
from .safetensors_file import (
    DTYPES,
    WAN_FAMILY,
    FileBytes,
    TensorFile,
    family_of,
    file_bytes,
    is_quantization_key,
    read_dequantized,
    read_headers,
    resolve,
    stream_tensors,
)
from .untrained import untrained_metadata
from .vlm_file import read_folder_shape, vlm_name

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # in full ComfyUI checkpoints
DROPPED_KEYS = re.compile(r"(^|\.)(cross_attn|attn2|norm3|norm2|text_embedding|condition_embedder\.text_embedder)\.")
HEAD_DIM = 128  # of every published Wan
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
PATCH_KEY = "patch_embedding.weight"
SEED = 0  # for initialising the context projection
EMBEDDED_VLM = "tiny"
EMBEDDED_FIELDS = ("vlm", "vlm_width", "vlm_num_layers", "max_video_tokens", "max_instruction_tokens", "edit_pixels", "edit_frames")


def init_from_wan(
    source: str | Path,
    destination: str | Path,
    *,
    layers: str = "first+last",
    vlm: str | Path = "8b",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MiVEConfig:
    """Reads a Wan2.1-T2V file, sharded index or diffusers folder, writes one MiVE file, returns its config.

    `vlm` is a size, `tiny` or a Qwen3-VL folder, see vlm_fields.
    `dtype` None keeps the source's; fp8 and quantised GGUF tensors become bf16. Holds one tensor at a time and calls
    progress(index, total) before each; if that raises, no file is left. Raises UserError for anything but a complete Wan T2V of finite numbers.
    """
    path = find_wan(source)
    sources = locate_tensors(path)
    shapes = {key: file.shapes[name] for key, (file, name) in sources.items()}
    config = config_from_shapes(path, shapes, layers, vlm)
    target_shapes = state_dict_shapes(config)
    new_keys = {key for key in target_shapes if key.startswith("context.")}
    copied = {key: shape for key, shape in target_shapes.items() if key not in new_keys}
    # the patch embedding also reads the source latents, whose channels get zero weights
    widened = (shapes[PATCH_KEY][0], 2 * shapes[PATCH_KEY][1], *shapes[PATCH_KEY][2:])
    check_shapes(path, {**{k: v for k, v in shapes.items() if not DROPPED_KEYS.search(k)}, PATCH_KEY: widened}, copied)
    if dtype is None:
        source_dtypes = {file.dtypes[name] for file, name in sources.values()}
        dtype = torch.bfloat16 if source_dtypes - {"F16", "F32"} else torch.float16 if "F16" in source_dtypes else torch.float32
    generator = torch.Generator().manual_seed(SEED)

    positions = {key: i for i, key in enumerate(target_shapes)}

    def produce(key: str) -> Tensor | FileBytes:
        if progress is not None:
            progress(positions[key], len(positions))
        if key in new_keys:
            return init_tensor(key, target_shapes[key], generator)
        file, name = sources[key]
        tensor = read_dequantized(file, name, dtype).view(shapes[key])
        check_finite(tensor, file, name)
        if key != PATCH_KEY and DTYPES.get(file.dtypes[name]) == dtype:
            return file_bytes(file, name)
        return torch.cat([tensor, torch.zeros_like(tensor)], dim=1) if key == PATCH_KEY else tensor

    stream_tensors(Path(destination), {key: (dtype, shape) for key, shape in target_shapes.items()}, produce, {**config.to_metadata(), **untrained_metadata()})
    return config


def find_wan(source: str | Path) -> Path:
    """A file, a sharded index or a diffusers folder -> the file or the index. Raises UserError if there is none."""
    path = check_input(source, "Wan checkpoint")
    if not path.is_dir():
        return path
    return resolve(path / "transformer" if (path / "transformer").is_dir() else path, DIFFUSERS_FILE)


def locate_tensors(path: Path) -> dict[str, tuple[TensorFile, str]]:
    """Maps each of Wan's own keys to its file and its key there. Keys of 8-bit storage are left out. Raises UserError for other models."""
    headers = read_headers(path)
    tensors = {name: (file, name) for file in headers for name in file.shapes}
    family = family_of(tensors)
    if family != WAN_FAMILY:
        raise UserError(f"this looks like {family}", where=path, expected=f"{WAN_FAMILY}, 1.3B or 14B")
    tensors = {_strip_prefix(name): location for name, location in tensors.items() if not is_quantization_key(name)}
    if any(".attn1." in name for name in tensors):
        tensors = rename_keys(tensors, WAN_TO_DIFFUSERS, backwards=True)
    return tensors


def vlm_fields(vlm: str | Path) -> dict[str, Any]:
    """Size of a published Qwen3-VL, `tiny` (the embedded one) or a Hugging Face folder of any -> fields of MiVEConfig. Raises UserError.

    The embedded one comes with the lengths of prompt and clip that it and the embedded VAE were trained with.
    """
    tiny = PRESETS[EMBEDDED_VLM]
    if str(vlm) in VLM_SIZES:
        width, num_layers = VLM_SIZES[str(vlm)]
        name = f"Qwen3-VL-{str(vlm).upper()}"
    elif str(vlm) == EMBEDDED_VLM:
        width, num_layers, name = tiny.vlm_width, tiny.vlm_num_layers, tiny.vlm
    elif Path(vlm).is_dir():
        width, num_layers = read_folder_shape(Path(vlm))
        name = vlm_name(width, Path(vlm).resolve())
    else:
        raise UserError("unknown VLM", where="vlm", got=vlm, expected=f"{', '.join(VLM_SIZES)}, {EMBEDDED_VLM}, or a folder of a Qwen3-VL")
    if (width, num_layers) == (tiny.vlm_width, tiny.vlm_num_layers):
        return {field: getattr(tiny, field) for field in EMBEDDED_FIELDS}
    return {"vlm": name, "vlm_width": width, "vlm_num_layers": num_layers}


def config_from_shapes(path: Path, shapes: dict[str, tuple[int, ...]], layers: str, vlm: str | Path) -> MiVEConfig:
    """Shapes by Wan's keys -> the config. Raises UserError if the file is incomplete or the VLM unknown."""
    fields = vlm_fields(vlm)
    try:
        width, channels, *patch_size = shapes[PATCH_KEY]
        ffn_width, freq_dim = shapes["blocks.0.ffn.0.weight"][0], shapes["time_embedding.0.weight"][1]
    except KeyError as error:
        raise UserError("the checkpoint is not whole", where=path, got=f"no {error.args[0]}", fix="download it again") from error
    if channels != 16:
        raise UserError("this Wan is not made for text to video", where=path, got=f"{channels} input channels", expected="16 (Wan2.1-T2V)")
    if width % HEAD_DIM:
        raise UserError("the width does not split into Wan's heads", where=path, got=f"width {width}", expected=f"a multiple of {HEAD_DIM}")
    num_blocks = 1 + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match)
    return MiVEConfig(
        width=width,
        num_heads=width // HEAD_DIM,
        ffn_width=ffn_width,
        num_blocks=num_blocks,
        freq_dim=freq_dim,
        patch_size=(patch_size[0], patch_size[1], patch_size[2]),
        layers=parse_layers(layers, fields["vlm_num_layers"]),
        **fields,
    )


def check_finite(tensor: Tensor, file: TensorFile, name: str) -> None:
    """Raises UserError if the tensor, as read from the file and converted, holds NaN or infinity."""
    if torch.stack(tensor.aminmax()).isfinite().all():  # NaN is both extremes; testing each number takes 40 times as long
        return
    if read_dequantized(file, name, torch.float32).isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"a number is too large for {dtype}", where=file.path, got=name, fix="take --dtype bf16 or fp32")
    raise UserError("the checkpoint holds NaN or infinity", where=file.path, got=name, fix="download it again, or take one from before its training diverged")


def init_tensor(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Initialises a tensor of the context projection: ones for norms, zeros for biases, Xavier for matrices."""
    if ".norms." in f".{key}":
        return torch.ones(shape)
    tensor = torch.zeros(shape)
    return nn.init.xavier_uniform_(tensor, generator=generator) if tensor.ndim == 2 else tensor


def _strip_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)
