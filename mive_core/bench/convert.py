"""Benchmarks the conversion of a Wan checkpoint: `init_from_wan` interleaved with a plain copy of the same file, and its peak memory.

The file has a Wan2.1-T2V's real shapes and random numbers; it is deleted afterwards.
"""

import math
import os
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import PRESETS, MiVEConfig
from ..errors import UserError
from ..formats.checkpoint import state_dict_shapes
from ..formats.from_wan import init_from_wan
from ..formats.safetensors_file import stream_tensors

TEXT_WIDTH = 4096  # width of Wan's umT5


def bench_convert(preset: str, *, folder: Path | None = None, repeats: int = 3, vlm: str = "8b") -> dict:
    """Bytes per second of the conversion and of the copy (each with its flush to disk), their ratio, and the conversion's peak memory.

    Needs twice the file's size in `folder` (None: the system's folder for temporary files); raises UserError if there is less space.
    """
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source, result = Path(temporary) / "wan.safetensors", Path(temporary) / "result.safetensors"
        layout = wan_layout(PRESETS[preset])
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        free = shutil.disk_usage(temporary).free
        if free < 2.1 * size:
            raise UserError("there is no room for the benchmark", where=temporary, got=f"{free / 1e9:.1f} GB free", expected=f"{2.1 * size / 1e9:.1f} GB")
        write_random(source, layout)
        before = peak_rss()
        seconds: dict[str, list[float]] = {"copy": [], "convert": []}
        for _ in range(repeats):
            for name, work in (("copy", lambda: shutil.copyfile(source, result)), ("convert", lambda: init_from_wan(source, result, vlm=vlm))):
                os.sync()
                start = time.perf_counter()
                work()
                os.sync()
                seconds[name].append(time.perf_counter() - start)
                written = result.stat().st_size
                result.unlink()
        rates = {"copy": size / statistics.median(seconds["copy"]), "convert": written / statistics.median(seconds["convert"])}
    return {
        "preset": preset,
        "bytes_read": size,
        "bytes_written": written,
        "repeats": repeats,
        "seconds": seconds,
        "bytes_per_second": rates,
        "speed_ratio": rates["convert"] / rates["copy"],
        "peak_rss": peak_rss(),
        "rss_before": before,
        "torch": torch.__version__,
    }


def peak_rss() -> int:
    """Peak resident bytes of this process, including its imports and the creation of the file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wan_layout(config: MiVEConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The keys, dtypes (bf16) and shapes of a Wan2.1-T2V, which shares its blocks with MiVE; with Wan's own patch size."""
    config = replace(config, patch_size=MiVEConfig.patch_size)
    shapes = {key: shape for key, shape in state_dict_shapes(config).items() if not key.startswith("context.")}
    doubled = shapes["patch_embedding.weight"]
    shapes["patch_embedding.weight"] = (doubled[0], doubled[1] // 2, *doubled[2:])
    for key, shape in list(shapes.items()):
        if ".self_attn." in key:
            shapes[key.replace(".self_attn.", ".cross_attn.")] = shape
    width = config.width
    shapes |= {f"blocks.{i}.norm3.{kind}": (width,) for i in range(config.num_blocks) for kind in ("weight", "bias")}
    shapes |= {
        "text_embedding.0.weight": (width, TEXT_WIDTH),
        "text_embedding.0.bias": (width,),
        "text_embedding.2.weight": (width, width),
        "text_embedding.2.bias": (width,),
    }
    return {key: (torch.bfloat16, shape) for key, shape in shapes.items()}


def write_random(path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> None:
    """Writes a file of that layout with normally distributed numbers."""
    largest = max(math.prod(shape) for _, shape in layout.values())
    numbers = torch.randn(largest, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def produce(key: str) -> Tensor:
        dtype, shape = layout[key]
        return numbers[: math.prod(shape)].view(shape).to(dtype)

    stream_tensors(path, layout, produce, metadata or {"format": "pt"})
