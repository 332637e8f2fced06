"""What a card does at the real sizes: every stage of an edit, on random weights, against the card's own measured speed.

L tokens of the DiT's sequence, D its width.
"""

import gc
import statistics
import time
from dataclasses import replace

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
from .against_diffusers import forward_of, timed
from .models import Workload, filled, random_dit, workload
from .stage import PAPER_FORWARDS, add_shares, measure, measure_dit, measure_speed, measure_vae, measure_vlm

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
COMPILED_BLOCKS = 4  # that eager and compiled are compared on: the others are alike
FORWARDS = (50, 30, PAPER_FORWARDS, 15, 8, 6, 4)  # 15: half of 30 steps taken from a cache; 8 to 4: few-step LoRAs
LIMIT = 450.0  # seconds after which no further part is begun: the long ones stand first, so that ten minutes suffice


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
    """Measures the parts (none: all of PARTS), each as seconds, peak bytes and, where operations are counted, the share of the
    device's own roofline. What does not fit the memory, or what the device cannot do, is reported as such, and the rest goes on;
    after `limit` seconds no further part is begun.

    size is (width, height) in pixels. Raises UserError for unknown presets and parts, sizes that do not fit, and a missing device.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError("unknown part", got=", ".join(unknown), expected=", ".join(PARTS))
    work = workload(preset, size=size, num_frames=num_frames, device=device, dtype=dtype, repeats=repeats, blocks=blocks)
    report = {"preset": preset, **work.describes}
    start, wanted = time.perf_counter(), ["speed", *(part for part in PARTS if part != "speed" and part in (parts or PARTS))]
    for part in tqdm(wanted, desc="parts"):
        report[part] = run_part(part, work, limit - (time.perf_counter() - start))
        add_shares(report[part], report["speed"])
    if {"vlm", "vae", "dit"} <= report.keys():
        report["edit_seconds_by_forwards"] = edit_seconds(report)
    return report | {"seconds_in_all": time.perf_counter() - start}


def run_part(part: str, work: Workload, left: float) -> dict:
    """The part's figures and how long they took to get, or why there are none."""
    if left <= 0:
        return {"skipped": "the time was used up"}
    begun = time.perf_counter()
    try:
        with torch.inference_mode(part != "training_block"):
            found = PARTS[part](work)
    except RuntimeError as error:
        found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
    return found | {"seconds_to_measure": time.perf_counter() - begun}


def edit_seconds(report: dict) -> dict[str, float]:
    """Seconds of a whole edit by the number of the DiT's forwards: what step caching and few-step LoRAs save. Empty where a stage has no figure."""
    try:
        around = report["vlm"]["seconds"] + sum(report["vae"][stage]["seconds"] for stage in ("encode", "decode"))
        return {str(count): around + count * report["dit"]["seconds"] for count in FORWARDS}
    except KeyError:
        return {}


def measure_attention(work: Workload) -> dict:
    """Each kernel of torch's attention at the DiT's real length, and how far its result is from that of torch's own choice."""
    length, config = work.layout.num_tokens, work.config
    q, k, v = torch.randn(3, 1, length, config.width, device=work.device, dtype=work.dtype)
    expected = torch_attention(q, k, v, config.num_heads)
    flops = {"flops": 4 * length**2 * config.width}
    found = {"chosen": measure(work, lambda: torch_attention(q, k, v, config.num_heads)) | flops}
    for name, backend in KERNELS.items():

        def attend() -> torch.Tensor:
            heads = (x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
            return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

        try:
            with sdpa_kernel(backend):
                found[name] = measure(work, attend) | flops | {"relative_difference": relative_difference(attend(), expected)}
        except RuntimeError as error:
            found[name] = {"failed": str(error).splitlines()[0]}
    return found


def measure_whole_dit(work: Workload) -> dict:
    """One forward, and as many as the paper's figures come to."""
    figures = measure_dit(work)
    return figures | {f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * figures["seconds"]}


def measure_dit_fp8(work: Workload) -> dict:
    """The same with the blocks' matrices in float8, multiplied as such."""
    figures = measure_dit(work, float8=True)
    return figures | {f"seconds_of_{PAPER_FORWARDS}": PAPER_FORWARDS * figures["seconds"]}


def measure_small_dit(work: Workload) -> dict:
    """Wan's 1.3B at the same size; nothing where that is what is measured already, or the preset is smaller."""
    small = PRESETS["1.3b"]
    if work.config.width <= small.width:
        return {}
    return measure_dit(replace(work, config=replace(small, num_blocks=min(small.num_blocks, work.config.num_blocks))))


def measure_compiled(work: Workload) -> dict:
    """A few blocks as they are and through torch.compile, taking turns."""
    few = replace(work, config=replace(work.config, num_blocks=min(COMPILED_BLOCKS, work.config.num_blocks)))
    calls = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)
        calls[name] = forward_of(random_dit(replace(few, compiled=compiled)), few.layout)
    begun = time.perf_counter()
    results = {name: call() for name, call in calls.items()}
    difference = relative_difference(results["compiled"], results["eager"])
    first = time.perf_counter() - begun
    seconds = {name: [] for name in calls}
    for _ in range(work.repeats):
        for name, call in calls.items():
            seconds[name].append(timed(lambda call=call: float(call().flatten()[0])))  # reading a number waits for the device
    return {
        "blocks": few.config.num_blocks,
        "seconds_to_compile": first,
        "relative_difference": difference,
        **{f"seconds_{name}": statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(b / a for a, b in zip(seconds["eager"], seconds["compiled"])),
    }


def measure_training_block(work: Workload) -> dict:
    """One block forward and backward over the whole sequence."""
    config, layout = work.config, work.layout
    with torch.device("meta"):
        block = Block(config.width, config.num_heads, config.ffn_width, config.eps, operations=nn, attention=torch_attention)
    block = filled(block, work).requires_grad_(True)
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
