"""Converts a Wan 2.1 text-to-video or Fun-Control checkpoint to a MiVE one: shared layers are copied, cross-attention is dropped, the rest initialised.

A Fun-Control's patch embedding reads the latents of a control video on channels of their own; these become the source's. Reads the
original layout, ComfyUI's single files and diffusers' folders, in 16 or 32 bits or scaled fp8, one tensor at a time.
C latent channels, D model width.
"""

import math
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
from .quantized_file import is_quantization_key, read_dequantized
from .safetensors_file import DTYPES, WAN_FAMILY, WAN_I2V_FAMILY, FileBytes, TensorFile, family_of, file_bytes, read_headers, resolve, stream_tensors
from .untrained import PATCH_KEY, untrained_metadata
from .vlm_file import read_folder_shape, vlm_name

REASONS = {  # why other models of the family do not convert
    "a Wan VACE checkpoint": "blocks beside the model's own that read the video; the T2V that it was made from converts",
    "a Wan S2V checkpoint": "layers that read sound inside the blocks",
    "a Wan Animate checkpoint": "layers that read a face and a pose inside the blocks",
    "a HuMo checkpoint": "layers that read sound inside the blocks",
    "a SCAIL or WanDancer checkpoint": "patch embeddings that read a pose or a mask",
    "a Wan Control-Camera checkpoint": "an adapter that reads a camera path, and no video",
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # in full ComfyUI checkpoints
DROPPED_KEYS = re.compile(r"(^|\.)(cross_attn|attn2|norm3|norm2|text_embedding|condition_embedder\.text_embedder)\.")
FUN_CONTROL_DROPPED_KEYS = re.compile(r"(^|\.)(img_emb|image_embedder|ref_conv)\.")  # its start image and its reference image
FUN_CONTROL_CHANNELS = (48, 52)  # 16 noisy, 16 of the control video, 4 of a mask (Wan2.2 only), 16 of a start image
START_IMAGE_CHANNELS = 36  # 16 noisy, 4 of a mask, 16 of a start image
HEAD_DIM = 128  # of every published Wan
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
EXPECTED = "Wan2.1-T2V (1.3B, 14B), an expert of Wan2.2-T2V-A14B, or a Fun-Control of these sizes"
EXPERT_FOLDERS = (("low_noise_model", "high_noise_model"), ("transformer_2", "transformer"))  # of Wan2.2, in the original and in diffusers' layout
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
    """Reads a file, sharded index or diffusers folder of a Wan T2V or Fun-Control, writes one MiVE file, returns its config.

    `vlm` is a size, `tiny` or a Qwen3-VL folder, see vlm_fields.
    `dtype` None keeps the source's; fp8 and quantised GGUF tensors become bf16. Holds one tensor at a time and calls
    progress(index, total) before each; if that raises, no file is left. Raises UserError for anything but a complete one of finite numbers.
    """
    path = find_wan(source)
    sources = locate_tensors(path)
    shapes = {key: file.shapes[name] for key, (file, name) in sources.items()}
    config = config_from_shapes(path, shapes, layers, vlm)
    target_shapes = state_dict_shapes(config)
    new_keys = {key for key in target_shapes if key.startswith("context.")}
    copied = {key: shape for key, shape in target_shapes.items() if key not in new_keys}
    is_control = shapes[PATCH_KEY][1] in FUN_CONTROL_CHANNELS
    kept = {k: v for k, v in shapes.items() if not DROPPED_KEYS.search(k) and not (is_control and FUN_CONTROL_DROPPED_KEYS.search(k))}
    check_shapes(path, {**kept, PATCH_KEY: target_shapes[PATCH_KEY]}, copied)
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
        check_converted(tensor, file, name)
        if key != PATCH_KEY and DTYPES.get(file.dtypes[name]) == dtype:
            return file_bytes(file, name)
        return widen_patches(tensor, config.latent_channels) if key == PATCH_KEY else tensor

    stream_tensors(Path(destination), {key: (dtype, shape) for key, shape in target_shapes.items()}, produce, {**config.to_metadata(), **untrained_metadata()})
    return config


def find_wan(source: str | Path) -> Path:
    """A file, a sharded index or a diffusers folder -> the file or the index. Raises UserError if there is none, or if there are two experts."""
    path = check_input(source, "Wan checkpoint")
    if not path.is_dir():
        return path
    for low, high in EXPERT_FOLDERS:
        if (path / low).is_dir() and (path / high).is_dir():
            fix = f"give one of them, such as {str(path / low)!r} (low noise)"
            raise UserError("this Wan2.2 has two experts, and a MiVE is one model", where=path, fix=fix)
    return resolve(path / "transformer" if (path / "transformer").is_dir() else path, DIFFUSERS_FILE)


def locate_tensors(path: Path) -> dict[str, tuple[TensorFile, str]]:
    """Maps each of Wan's own keys to its file and its key there. Keys of 8-bit storage are left out. Raises UserError for other models."""
    headers = read_headers(path)
    tensors = {name: (file, name) for file in headers for name in file.shapes}
    family = family_of(tensors)
    if family not in (WAN_FAMILY, WAN_I2V_FAMILY):
        raise UserError(f"this looks like {family}", where=path, got=REASONS.get(family), expected=EXPECTED)
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
        rows = shapes["head.head.weight"][0]
        ffn_width, freq_dim = shapes["blocks.0.ffn.0.weight"][0], shapes["time_embedding.0.weight"][1]
    except KeyError as error:
        raise UserError("the checkpoint is not whole", where=path, got=f"no {error.args[0]}", fix="download it again") from error
    check_channels(path, channels, rows // math.prod(patch_size), family_of(shapes))
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


def check_channels(path: Path, inputs: int, outputs: int, family: str) -> None:
    """Raises UserError, with the kind of model and the reason, unless a Wan of that many input and output channels converts."""
    latents = MiVEConfig.latent_channels
    if outputs != latents:
        what, got = "this Wan has another VAE than Wan2.1's (TI2V-5B and Fun-5B have Wan2.2's)", f"{outputs} output channels; expected {latents}"
    elif inputs in FUN_CONTROL_CHANNELS or (inputs == latents and family == WAN_FAMILY):
        return
    elif inputs in (latents, START_IMAGE_CHANNELS):
        what, got = f"this looks like {WAN_I2V_FAMILY} (I2V, FLF2V, Fun-InP)", f"{inputs} input channels, which read a start image and no video"
    else:
        what, got = "this Wan is not made for text to video", f"{inputs} input channels"
    channels = f"{latents} input channels (T2V), or {' or '.join(map(str, FUN_CONTROL_CHANNELS))} (Fun-Control)"
    raise UserError(what, where=path, got=got, expected=f"{channels}: {EXPECTED}")


def widen_patches(weight: Tensor, channels: int) -> Tensor:
    """Patch embedding (D, C or more, pt, ph, pw) -> (D, 2 C, pt, ph, pw): for the noisy latents and the source's.

    The source's half is the control video's channels, which follow the noisy ones, or else zeros.
    """
    if weight.shape[1] > channels:
        return weight[:, : 2 * channels].contiguous()
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


def check_converted(tensor: Tensor, file: TensorFile, name: str) -> None:
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
