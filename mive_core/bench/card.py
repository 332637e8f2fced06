"""Benchmarks a GPU at real sizes: every stage of an edit, with random weights, relative to the GPU's own measured speed.

L tokens of the DiT's sequence, D its width.
"""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..attention import relative_difference, torch_attention
from ..config import PRESETS
from ..cost.flops import block_flops
from ..dit.blocks import Block, Modulation
from ..dit.rope import rotary_table
from ..errors import UserError
from .against_diffusers import make_forward, timed
from .models import Workload, fill_random, random_dit, workload
from .stage import PAPER_FORWARDS, add_shares, measure, measure_dit, measure_speed, measure_vae, measure_vlm

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
COMPILED_BLOCKS = 4  # blocks in the comparison of eager and compiled; the others behave in the same way
FORWARDS = (50, 30, PAPER_FORWARDS, 15, 8, 6, 4)  # 15: 30 steps, half of them from a step cache; 8 to 4: few-step LoRAs
LIMIT = 450.0  # seconds after which no further part starts; long parts come first, so that ten minutes suffice


def bench_card(
    preset: str = "14b",
    *,
    size: tuple[int, int] = (1280, 720),
    num_frames: int = 81,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 3,
    blocks: int | None = None,
    parts: tuple[str, ...] = (),
    limit: float = LIMIT,
) -> dict:
    """Measures the parts (none: all of PARTS): seconds, peak bytes and, if operations are counted, the share of the device's roofline.

    A part that does not fit into memory, or that the device does not support, is reported as failed, and the rest continues. After
    `limit` seconds no further part starts. size is (width, height) in pixels. Raises UserError for unknown presets and parts, sizes that
    do not fit, and a missing device.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError("unknown part", got=", ".join(unknown), expected=", ".join(PARTS))
    work = workload(preset, size=size, num_frames=num_frames, device=device, dtype=dtype, repeats=repeats, blocks=blocks)
    report = {"preset": preset, **work.description}
    start, wanted = time.perf_counter(), ["speed", *(part for part in PARTS if part != "speed" and part in (parts or PARTS))]
    for part in tqdm(wanted, desc="parts"):
        report[part] = run_part(part, work, limit - (time.perf_counter() - start))
        add_shares(report[part], report["speed"])
    if {"vlm", "vae", "dit"} <= report.keys():
        report["edit_seconds_by_forwards"] = edit_seconds(report)
    return report | {"seconds_in_all": time.perf_counter() - start}


def run_part(part: str, work: Workload, remaining: float) -> dict:
    """The part's figures and the seconds that the measurement took, or the reason why it has none."""
    if remaining <= 0:
        return {"skipped": "the time was used up"}
    return attempt(lambda: PARTS[part](work), work.device, gradients=part == "training_block")


def attempt(measure_part: Callable[[], dict], device: torch.device, *, gradients: bool = False) -> dict:
    """The figures, or why there are none, such as no memory left or a missing package; whatever it is, other parts go on. Then frees memory."""
    start = time.perf_counter()
    try:
        with torch.inference_mode(not gradients):
            figures = measure_part()
    except Exception as error:
        figures = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # a card that has failed once may fail here again
            torch.cuda.empty_cache()
    return figures | {"seconds_to_measure": time.perf_counter() - start}


def edit_seconds(report: dict) -> dict[str, float]:
    """Seconds of an edit by number of DiT forwards, which step caches and few-step LoRAs reduce. Empty if a stage has no figure."""
    try:
        other_stages = report["vlm"]["seconds"] + sum(report["vae"][stage]["seconds"] for stage in ("encode", "decode"))
        return {str(count): other_stages + count * report["dit"]["seconds"] for count in FORWARDS}
    except KeyError:
        return {}


def measure_attention(work: Workload) -> dict:
    """Each of torch's attention kernels at the DiT's real length, and the difference of its result from that of torch's default."""
    length, config = work.layout.num_tokens, work.config
    q, k, v = torch.randn(3, 1, length, config.width, device=work.device, dtype=work.dtype)
    expected = torch_attention(q, k, v, config.num_heads)
    flops = {"flops": 4 * length**2 * config.width}
    figures = {"chosen": measure(work, lambda: torch_attention(q, k, v, config.num_heads)) | flops}
    for name, backend in KERNELS.items():

        def attend() -> torch.Tensor:
            heads = (x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
            return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        try:
            with sdpa_kernel(backend):
                figures[name] = measure(work, attend) | flops | {"relative_difference": relative_difference(attend(), expected)}
        except RuntimeError as error:
            figures[name] = {"failed": str(error).splitlines()[0]}
    return figures


def measure_whole_dit(work: Workload) -> dict:
    """One forward pass, and as many as the paper's time amounts to."""
    figures = measure_dit(work)
    return figures | {f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * figures["seconds"]}


def measure_dit_fp8(work: Workload) -> dict:
    """The same with the blocks' matrices stored and multiplied in float8."""
    figures = measure_dit(work, float8=True)
    return figures | {f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * figures["seconds"]}


def measure_small_dit(work: Workload) -> dict:
    """Wan's 1.3B at the same size; empty if the preset itself is not larger."""
    small = PRESETS["1.3b"]
    if work.config.width <= small.width:
        return {}
    return measure_dit(replace(work, config=replace(small, num_blocks=min(small.num_blocks, work.config.num_blocks))))


def measure_compiled(work: Workload) -> dict:
    """A few blocks in eager mode and through torch.compile, interleaved."""
    few = replace(work, config=replace(work.config, num_blocks=min(COMPILED_BLOCKS, work.config.num_blocks)))
    calls = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)
        calls[name] = make_forward(random_dit(replace(few, compiled=compiled)), few.layout)
    start = time.perf_counter()
    results = {name: call() for name, call in calls.items()}
    difference = relative_difference(results["compiled"], results["eager"])
    compile_seconds = time.perf_counter() - start
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(work.repeats):
        for name, call in calls.items():
            seconds[name].append(timed(partial(_first_value, call)))
    return {
        "blocks": few.config.num_blocks,
        "seconds_to_compile": compile_seconds,
        "relative_difference": difference,
        **{f"seconds_{name}": statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(b / a for a, b in zip(seconds["eager"], seconds["compiled"])),
    }


def _first_value(call: Callable[[], torch.Tensor]) -> float:
    """Reads one number of the result, which waits for the device."""
    return float(call().flatten()[0])


def measure_training_block(work: Workload) -> dict:
    """Forward and backward pass of one block over the whole sequence."""
    config, layout = work.config, work.layout
    with torch.device("meta"):
        block = Block(config.width, config.num_heads, config.ffn_width, config.eps, operations=nn, attention=torch_attention)
    block = fill_random(block, work).requires_grad_(True)
    tokens = torch.randn(1, layout.num_tokens, config.width, device=work.device, dtype=work.dtype, requires_grad=True)
    rows = torch.randn(1, 6, config.width, device=work.device, dtype=work.dtype)
    time = Modulation(rows, rows, layout.num_condition + layout.grid[1] * layout.grid[2])
    rotary = rotary_table(layout.num_condition, layout.grid, config.head_dim, config.rope_theta, work.device)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        block(tokens, time, rotary).sum().backward()

    return measure(work, step) | {"flops": 3 * block_flops(config, layout.num_tokens)}


PARTS = {
    "speed": measure_speed,
    "attention": measure_attention,
    "dit": measure_whole_dit,
    "dit_fp8": measure_dit_fp8,
    "vlm": measure_vlm,
    "training_block": measure_training_block,
    "vae": lambda work: measure_vae(replace(work, repeats=1)),
    "dit_1.3b": measure_small_dit,
    "compiled": measure_compiled,
}
