"""Benchmarks model loading: seconds, and the peak memory of a process that does nothing else, relative to the file's size.

The files have real shapes and random numbers; they are deleted afterwards.
"""

import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..attention import torch_attention
from ..config import PRESETS, VLM_INTERMEDIATE_SIZES, VLM_SIZES
from ..errors import UserError
from ..formats.checkpoint import load_dit, state_dict_shapes
from ..formats.safetensors_file import INDEX_SUFFIX
from ..vlm import load_single_file, model_from_config
from .convert import write_random

GOAL = 1.15  # peak memory relative to the file's size
STATUS = Path("/proc/self/status")
# shapes of the published Qwen3-VLs, other than width and depth: heads; vision depth, width, inner width
VLM_SHAPES = {"2b": (16, 24, 1024, 4096), "4b": (32, 24, 1024, 4096), "8b": (32, 27, 1152, 4304), "32b": (64, 27, 1152, 4304)}
VOCABULARY_SIZE, NUM_POSITIONS, NUM_KEY_VALUE_HEADS, HEAD_DIM = 151_936, 2304, 8, 128


def bench_load(model: str, *, shards: int = 1, folder: Path | None = None, float8: bool = False, blocks: int | None = None) -> dict:
    """model: a preset of the DiT, or 2b to 32b for a Qwen3-VL in one file -> bytes of the file and of memory, and seconds.

    `float8` stores the VLM's matrices in 8 bits. Raises UserError if there is no disk space, or the system does not report peak memory.
    """
    if model not in PRESETS.keys() | VLM_SIZES.keys():
        raise UserError("unknown model", got=model, expected=", ".join([*PRESETS, *VLM_SIZES]))
    if not STATUS.exists():
        raise UserError("this system does not tell a process's peak memory", expected="Linux")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        layout, metadata = vlm_layout(model, blocks, float8) if model in VLM_SIZES else dit_layout(model, blocks)
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        free = shutil.disk_usage(temporary).free
        if free < 1.05 * size:
            raise UserError("there is no room for the benchmark", where=temporary, got=f"{free / 1e9:.1f} GB free", expected=f"{1.05 * size / 1e9:.1f} GB")
        path = write_shards(Path(temporary), layout, metadata, shards)
        with multiprocessing.get_context("spawn").Pool(1) as process:
            figures = process.apply(measure_load, (_load_vlm if model in VLM_SIZES else _load_dit, path))
    return {
        "model": model,
        "blocks": blocks,
        "shards": shards,
        "float8": float8,
        "file_bytes": size,
        **figures,
        "growth_over_file": (figures["peak_rss"] - figures["rss_before"]) / size,
        "peak_over_file": figures["peak_rss"] / size,
        "goal": GOAL,
        "torch": torch.__version__,
    }


def measure_load(load: Callable[[Path], nn.Module], path: Path) -> dict:
    """Returns resident bytes before, at the peak and after, and the seconds; must run in a process of its own."""
    before = resident("VmRSS")
    start = time.perf_counter()
    model = load(path)
    seconds = time.perf_counter() - start
    model_bytes = sum(value.numel() * value.itemsize for value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.values())
    return {"seconds": seconds, "rss_before": before, "peak_rss": resident("VmHWM"), "rss_after": resident("VmRSS"), "model_bytes": model_bytes}


def resident(field: str) -> int:
    """This process's resident bytes: VmRSS now, VmHWM at the peak (Linux)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _load_dit(path: Path):
    return load_dit(path, attention=torch_attention, dtype=torch.bfloat16)


def _load_vlm(path: Path):
    # imports everything before the measurement
    model_from_config({"text_config": {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 8, "head_dim": 8}, "vision_config": {"depth": 1}})
    return load_single_file(path, torch.bfloat16, "cpu")


def dit_layout(preset: str, blocks: int | None) -> tuple[dict, dict[str, str]]:
    """The keys, dtypes (bf16) and shapes of a MiVE checkpoint, and its metadata."""
    config = replace(PRESETS[preset], num_blocks=blocks or PRESETS[preset].num_blocks)
    return {key: (torch.bfloat16, shape) for key, shape in state_dict_shapes(config).items()}, config.to_metadata()


def vlm_layout(size: str, layers: int | None, float8: bool) -> tuple[dict, dict[str, str]]:
    """The same for a Qwen3-VL in one file, as ComfyUI uses it; `layers` reduces the depth."""
    (width, depth), (heads, vision_depth, vision_width, vision_inner) = VLM_SIZES[size], VLM_SHAPES[size]
    values = {
        "text_config": {
            "hidden_size": width,
            "intermediate_size": VLM_INTERMEDIATE_SIZES[width],
            "num_hidden_layers": layers or depth,
            "num_attention_heads": heads,
            "num_key_value_heads": NUM_KEY_VALUE_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCABULARY_SIZE,
        },
        "vision_config": {
            "depth": vision_depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_inner,
            "out_hidden_size": width,
            "num_position_embeddings": NUM_POSITIONS,
        },
    }
    with torch.device("meta"):
        state = model_from_config(values).state_dict()
    layout = {}
    for key, value in state.items():
        quantized = float8 and value.ndim == 2 and key.endswith("_proj.weight")
        layout[f"model.{key}"] = (torch.float8_e4m3fn if quantized else torch.bfloat16, tuple(value.shape))
        if quantized:
            layout[f"model.{key.removesuffix('weight')}weight_scale"] = (torch.float32, ())
    return layout, {"format": "pt"}


def write_shards(folder: Path, layout: dict, metadata: dict[str, str], shards: int) -> Path:
    """Writes shards with about the same number of tensors, and an index if there are several -> the path to load."""
    keys = list(layout)
    if shards == 1:
        write_random(folder / "dit.safetensors", layout, metadata)
        return folder / "dit.safetensors"
    parts = {f"dit-{i + 1:05d}-of-{shards:05d}.safetensors": keys[i * len(keys) // shards : (i + 1) * len(keys) // shards] for i in range(shards)}
    for name, shard in parts.items():
        write_random(folder / name, {key: layout[key] for key in shard}, metadata)
    index = folder / f"dit{INDEX_SUFFIX}"
    index.write_text(json.dumps({"weight_map": {key: name for name, shard in parts.items() for key in shard}}))
    return index
