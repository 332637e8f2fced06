"""Qwen3-VL in a single file, as used with ComfyUI: without a config, possibly with 8-bit weights and their scales.

The size follows from the shapes; all other settings are the same in all published sizes (2B to 32B).
Of a Hugging Face folder it reads the size only.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..config import VLM_SIZES
from ..errors import UserError
from ..media.paths import check_input
from .quantized_file import is_quantization_key, read_dequantized
from .safetensors_file import VLM_FAMILY, read_header

# the same in every published Qwen3-VL
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 151655, 151656, 151652, 151653
MROPE_SECTION = [24, 20, 20]
ROPE_THETA = 5_000_000.0
VISION_HEADS, MERGE_SIZE = 16, 2
DEEPSTACK = {24: [5, 11, 17], 27: [8, 16, 24]}  # by depth of the vision tower
PREPROCESSING = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": MERGE_SIZE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGE_SIZE = {"shortest_edge": 65_536, "longest_edge": 16_777_216}  # pixels
VIDEO_SIZE = {"shortest_edge": 4_096, "longest_edge": 25_165_824}

SIZE_NAMES = {128: "tiny", **{width: size.upper() for size, (width, _) in VLM_SIZES.items()}}  # by width; tiny is the embedded one


def config_from_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict:
    """Shapes, by keys without the leading `model.` -> the values of a Qwen3VLConfig. Raises UserError if the Qwen3-VL is incomplete."""
    try:
        vocabulary, width = shapes["language_model.embed_tokens.weight"]
        head_dim = shapes["language_model.layers.0.self_attn.q_norm.weight"][0]
        text = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "head_dim": head_dim,
            "num_hidden_layers": _depth(shapes, "language_model.layers."),
            "intermediate_size": shapes["language_model.layers.0.mlp.gate_proj.weight"][0],
            "num_attention_heads": shapes["language_model.layers.0.self_attn.q_proj.weight"][0] // head_dim,
            "num_key_value_heads": shapes["language_model.layers.0.self_attn.k_proj.weight"][0] // head_dim,
        }
        vision_width, _, frames, patch, _ = shapes["visual.patch_embed.proj.weight"]
        depth = _depth(shapes, "visual.blocks.")
        vision = {
            "depth": depth,
            "hidden_size": vision_width,
            "patch_size": patch,
            "temporal_patch_size": frames,
            "out_hidden_size": width,
            "intermediate_size": shapes["visual.blocks.0.mlp.linear_fc1.weight"][0],
            "num_position_embeddings": shapes["visual.pos_embed.weight"][0],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError("this is no whole Qwen3-VL", where=path, got=f"no {error.args[0]}", expected="language model and vision tower in one file") from error
    if depth not in DEEPSTACK or 2 * sum(MROPE_SECTION) != head_dim or (frames, patch) != (PREPROCESSING["temporal_patch_size"], PREPROCESSING["patch_size"]):
        raise UserError(
            "this is no published Qwen3-VL",
            where=path,
            got=f"{depth} vision layers, heads of {head_dim}, patches of {patch}",
            expected=f"{' or '.join(map(str, DEEPSTACK))} vision layers, heads of {2 * sum(MROPE_SECTION)}, patches of {PREPROCESSING['patch_size']}",
            fix="load it as a Hugging Face folder, with its config.json",
        )
    common = {
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262_144,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": MROPE_SECTION},
    }
    return {
        "text_config": {**text, **common},
        "vision_config": {**vision, "num_heads": VISION_HEADS, "spatial_merge_size": MERGE_SIZE, "deepstack_visual_indexes": DEEPSTACK[depth]},
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }


def read_single_file(path: Path, dtype: torch.dtype) -> tuple[dict, dict[str, Tensor]]:
    """One .safetensors file -> the values of a Qwen3VLConfig and the body's weights in `dtype`; 8-bit ones are dequantised.

    The language head is left out. Raises UserError for anything but a complete Qwen3-VL in 8, 16 or 32-bit floats.
    """
    header = read_header(path)
    if header.family != VLM_FAMILY:
        raise UserError(f"this looks like {header.family}", where=path, expected=VLM_FAMILY)
    body = {key: key.removeprefix("model.") for key in header.shapes if not is_quantization_key(key) and not key.startswith("lm_head.")}
    config = config_from_shapes(path, {name: header.shapes[key] for key, name in body.items()})
    return config, {name: read_dequantized(header, key, dtype) for key, name in body.items()}


def read_folder_shape(folder: Path) -> tuple[int, int]:
    """A Hugging Face folder of a Qwen3-VL -> its width and number of layers, as config.json says. Raises UserError."""
    path = check_input(folder / "config.json", "VLM config")
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text_config"]
        return int(text["hidden_size"]), int(text["num_hidden_layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("this is no config of a Qwen3-VL", where=path, got=f"{type(error).__name__}: {error}", expected="a text_config in it") from error


def vlm_name(width: int, path: Path) -> str:
    """The model's name, such as Qwen3-VL-8B, or the name of the file or folder if the width is unknown."""
    size = SIZE_NAMES.get(width)
    return f"Qwen3-VL-{size}" if size else path.stem


def _depth(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix)]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return 1 + max(numbers)
