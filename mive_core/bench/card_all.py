"""All figures of a card in one run that keeps to a time: forwards of the 14B and the 1.3B, a training step, a whole edit, and the goals for them.

Parts stand in the order of their importance. One whose estimated time no longer fits, or which needs more memory than is free, is left out,
and the report says so. Weights are random and made on the device.
"""

import importlib.metadata
import importlib.util
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from tqdm import tqdm

from .. import __version__
from ..config import PRESETS, VLM_SIZES, MiVEConfig
from ..cost.flops import block_flops, dit_flops
from ..cost.memory import activation_bytes, vae_decode_bytes, vae_encode_bytes, weight_bytes
from ..errors import UserError
from ..pipeline import check_device
from ..train.budget import ACTIVATION_SIZES, block_size
from ..train.throughput import peak_flops_by_name
from ..vlm import model_from_config
from .card import attempt, measure_compiled, measure_training_block
from .card_goals import goals
from .forward import FORMATS, RESERVE, Forward, float8_product, free_bytes, why_not_multiplied
from .models import Workload, random_network
from .stage import MATRIX_SIDES, add_shares, measure_edit, measure_speed, measure_vae, measure_vlm, synchronized_seconds, vae_flops

BUDGET, LEAST_BUDGET = 460.0, 20.0  # seconds; 8 minutes with the start of Python
SHARE_OF_SPEED, VAE_SHARE = 0.4, 0.08  # assumed in estimates: of the measured speed of a large matrix product; the VAE's convolutions reach less
EDIT_STEPS = 4
COMPILE_SECONDS, STAGES_SECONDS = 60.0, 15.0  # assumed in estimates, beside the arithmetic
RUN_SECONDS = 0.25  # of matrix products in a row
VAE_SAMPLE = ((128, 128), 17)  # size and frames at which the VAE's operations are counted; they grow with the number of pixels


@dataclass(frozen=True)
class Scale:
    """The shapes of a run: two DiTs by name, the larger first, sizes of a clip in pixels, and the config of the whole edit."""

    models: dict[str, MiVEConfig]
    sizes: tuple[tuple[int, int], ...]
    num_frames: int
    edit: MiVEConfig

    @property
    def large(self) -> str:
        return next(iter(self.models))


TINY = replace(PRESETS["tiny"], num_blocks=5)
VLM_WIDTH, VLM_LAYERS = VLM_SIZES["2b"]
SCALES = {
    "real": Scale(
        {name: PRESETS[name] for name in ("14b", "1.3b")},
        ((1280, 720), (832, 480)),
        81,
        replace(PRESETS["1.3b"], vlm="Qwen3-VL-2B", vlm_width=VLM_WIDTH, vlm_num_layers=VLM_LAYERS),
    ),
    "small": Scale({"large": TINY, "small": replace(TINY, width=128, ffn_width=512, num_heads=2)}, ((96, 64), (64, 48)), 5, TINY),
}


@dataclass(frozen=True)
class Part:
    """A measurement, and what it takes: operations, seconds beside them, and bytes."""

    measure: Callable[[], dict]
    flops: float = 0.0
    seconds: float = 0.0
    needed_bytes: int = 0
    gradients: bool = False


def bench_card_all(device: str = "cuda", *, scale: str = "real", budget: float = BUDGET) -> dict:
    """Measures all parts that fit into the device's memory and into `budget` seconds -> the report, with the goals of card_goals.py.

    Raises UserError for an unknown scale, a budget below LEAST_BUDGET and a missing device.
    """
    start = time.perf_counter()
    if scale not in SCALES:
        raise UserError("unknown scale", where="scale", got=scale, expected=" or ".join(SCALES))
    if not budget >= LEAST_BUDGET:
        raise UserError("the budget is too small to measure anything", where="budget", got=f"{budget:g} s", expected=f"{LEAST_BUDGET:g} s or more")
    check_device(device)
    base, notes = base_workload(SCALES[scale], device)
    report: dict = {"scale": scale, "device": describe_device(base.device), "software": describe_software(), "dtype": str(base.dtype).removeprefix("torch.")}
    large, (width, height) = SCALES[scale].large, SCALES[scale].sizes[0]
    report |= {
        "notes": notes,
        "first": f"{large}_{width}x{height}",
        "budget_seconds": budget,
        "speed": attempt(partial(measure_speeds, base), base.device),
        "parts": {},
    }
    speed = report["speed"].get("flops_per_second")
    for name, part in tqdm(plan(SCALES[scale], base).items(), desc="parts"):
        left = budget - (time.perf_counter() - start)
        figures = report["parts"][name] = run_part(part, base.device, speed, left)
        add_shares(figures, report["speed"])
        if "roofline_seconds" in figures:
            figures["times_roofline"] = figures["seconds"] * speed / figures["flops"]
    report["left_out"] = {name: figures["skipped"] for name, figures in report["parts"].items() if "skipped" in figures}
    return report | {"goals": goals(report), "seconds_in_all": time.perf_counter() - start}


def run_part(part: Part, device: torch.device, speed: float | None, left: float) -> dict:
    """The part's figures, or {"skipped": why}, with the estimated seconds or the bytes that are needed."""
    estimate = part.seconds + (part.flops / speed / SHARE_OF_SPEED if speed else 0.0)
    free = free_bytes(device)
    if free is not None and part.needed_bytes > free:
        why = f"needs {part.needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB were free"
        return {"skipped": why, "needed_bytes": part.needed_bytes, "free_bytes": free}
    if estimate > left:
        return {
            "skipped": f"would take about {estimate:.0f} s, {max(left, 0):.0f} s of the budget were left",
            "estimated_seconds": estimate,
            "seconds_left": left,
        }
    figures = attempt(part.measure, device, gradients=part.gradients)
    return figures | {"estimated_seconds": estimate, "needed_bytes": part.needed_bytes, "free_bytes": free}


def plan(scale: Scale, base: Workload) -> dict[str, Part]:
    """All parts by name, the most important first."""
    work = {(name, size): replace(base, config=config, size=size) for name, config in scale.models.items() for size in scale.sizes}
    first, second = scale.sizes

    def forwards(model: str, size: tuple[int, int], formats: tuple[str, ...] = FORMATS[:2], whole: bool = False) -> dict[str, Part]:
        return {part_name(model, size, name, whole): forward_part(Forward(work[model, size], name, whole)) for name in formats}

    large, small = scale.models
    parts = forwards(large, first) | {"training_block": training_part([work[large, first], work[large, second], replace(work[large, second], num_frames=5)])}
    parts |= forwards(large, second) | {"edit": edit_part(replace(base, config=scale.edit, size=second))}
    parts |= forwards(large, first, whole=True)
    if base.device.type == "cuda" and importlib.util.find_spec("sageattention"):
        parts |= forwards(large, first, FORMATS[2:])
    parts |= forwards(small, first) | forwards(small, second)
    parts["stages"] = stages_part(work[large, first])
    if base.device.type == "cuda":
        parts["compiled"] = compiled_part(work[large, first])
    return parts


def part_name(model: str, size: tuple[int, int], format_name: str, whole: bool = False) -> str:
    return f"{model}_{size[0]}x{size[1]}_{format_name}{'_whole' if whole else ''}"


def forward_part(forward: Forward) -> Part:
    return Part(forward.measure, twice_on_cpu(forward.work, forward.flops), needed_bytes=forward.needed_bytes)


def training_part(candidates: list[Workload]) -> Part:
    """A block's training step on the longest of the clips, which are ordered by length, whose memory is free."""

    def needed(work: Workload) -> int:
        per_width, per_ffn_width = ACTIVATION_SIZES[2, True]
        activations = work.layout.num_tokens * (per_width * work.config.width + per_ffn_width * work.config.ffn_width)
        return round(activations + 2 * block_size(work.config) * work.dtype.itemsize + RESERVE[work.device.type])

    free = free_bytes(candidates[0].device)
    work = next((work for work in candidates if free is None or needed(work) <= free), candidates[-1])

    def measure() -> dict:
        figures = measure_training_block(work)
        peak = peak_flops_by_name(torch.cuda.get_device_name(work.device)) if work.device.type == "cuda" else None
        shape = {"size": list(work.size), "frames": work.num_frames, "tokens": work.layout.num_tokens, "peak_flops_per_second": peak}
        return figures | shape | {"mfu": figures["flops"] / figures["seconds"] / peak if peak else None}

    flops = (1 + work.repeats) * 3 * block_flops(work.config, work.layout.num_tokens)
    return Part(measure, twice_on_cpu(work, flops), needed_bytes=needed(work), gradients=True)


def edit_part(work: Workload) -> Part:
    """A whole edit through Pipeline: each stage once cold and once timed, then the edit."""
    vae, vlm = scaled_vae_flops(work), vlm_weights(work)
    read = 2 * vlm * (work.config.max_video_tokens + work.config.max_instruction_tokens)
    flops = 3 * (read + vae["encode"]) + 2 * vae["decode"] + (2 * EDIT_STEPS + 1) * dit_flops(work.config, work.layout)
    weights = vlm * work.dtype.itemsize + weight_bytes(work.config, work.dtype.itemsize)
    needed = round(weights + max(vae_bytes(work), activation_bytes(work.config, work.layout.num_tokens, work.dtype.itemsize)) + RESERVE[work.device.type])

    def measure() -> dict:
        figures = measure_edit(work, EDIT_STEPS)
        return {"vlm": work.config.vlm, "size": list(work.size), "frames": work.num_frames, "tokens": work.layout.num_tokens, "seconds": None} | {
            **{name: value for name, value in figures.items() if name != "whole"},
            **figures["whole"],
        }

    return Part(measure, twice_on_cpu(work, flops), STAGES_SECONDS, needed)


def stages_part(work: Workload) -> Part:
    """What an edit with the large DiT takes beside the forwards: its VLM and the VAE, at the first size."""
    vae, vlm = scaled_vae_flops(work), vlm_weights(work)
    flops = 8 * vlm * (work.config.max_video_tokens + work.config.max_instruction_tokens) + vae["encode"] + 2 * vae["decode"]
    needed = round(max(vlm * work.dtype.itemsize, vae_bytes(work)) + RESERVE[work.device.type])

    def measure() -> dict:
        vlm_seconds = measure_vlm(work)["seconds"]
        figures = measure_vae(replace(work, repeats=1))
        seconds = {"vlm": vlm_seconds} | {name: figures[name]["seconds"] for name in ("encode", "decode", "decode_tiled")}
        return {
            "vlm": work.config.vlm,
            "size": list(work.size),
            "frames": work.num_frames,
            "stage_seconds": seconds,
            "seconds": vlm_seconds + seconds["encode"] + seconds["decode"],
        }

    return Part(measure, twice_on_cpu(work, flops), STAGES_SECONDS, needed)


def compiled_part(work: Workload) -> Part:
    few = Forward(work, "bf16")
    return Part(partial(measure_compiled, work), 2 * few.flops, COMPILE_SECONDS, 2 * few.needed_bytes)


def twice_on_cpu(work: Workload, flops: float) -> float:
    """On a CPU each part runs once more, with its tensors counted."""
    return flops * (2 if work.device.type == "cpu" else 1)


def vlm_weights(work: Workload) -> int:
    """Number of the VLM's weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in model_from_config(work.vlm_config).parameters())


def vae_bytes(work: Workload) -> int:
    width, height = work.size
    itemsize, conv2d = work.dtype.itemsize, work.device.type == "cpu"
    channels = random_network(work).config.base_dim
    needs = (count(work.num_frames, height, width, itemsize, channels=channels, conv2d=conv2d) for count in (vae_decode_bytes, vae_encode_bytes))
    return max(needs)


def scaled_vae_flops(work: Workload) -> dict[str, float]:
    """Operations of encoding and decoding, from those of a small clip, as many as take the same time at SHARE_OF_SPEED."""
    size, num_frames = VAE_SAMPLE
    factor = math.prod(work.size) * work.num_frames / (math.prod(size) * num_frames) * SHARE_OF_SPEED / VAE_SHARE
    return {name: factor * flops for name, flops in vae_flops(replace(work, size=size, num_frames=num_frames)).items()}


def base_workload(scale: Scale, device: str) -> tuple[Workload, list[str]]:
    """The run's device and dtype, and what had to be replaced: cards before Ampere have no bfloat16."""
    dtype, notes = torch.bfloat16, []
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16
        notes.append("the card computes no bfloat16; float16 is measured in its place, under the name bf16")
    return Workload(scale.models[scale.large], scale.sizes[0], scale.num_frames, torch.device(device), dtype), notes


def measure_speeds(work: Workload) -> dict:
    """The device's matrix product in 16 and 8 bits, and its copy."""
    side, reason = MATRIX_SIDES[work.device.type], why_not_multiplied(work.device)
    a = torch.randn(side, side, device=work.device, dtype=work.dtype)
    figures = measure_speed(work) | {"flops_per_second": sustained_speed(work, lambda: a @ a, side)}
    return figures | ({"float8": reason} if reason else {"float8_flops_per_second": sustained_speed(work, float8_product(a), side)})


def sustained_speed(work: Workload, product: Callable[[], torch.Tensor], side: int) -> float:
    """Operations per second of a product of (side, side) matrices, the best of some runs that are long enough for a card to raise its clock."""
    once = min(synchronized_seconds(work, product) for _ in range(3))
    count = math.ceil(RUN_SECONDS / once)

    def run() -> None:
        for _ in range(count):
            product()

    return 2 * side**3 * count / min(synchronized_seconds(work, run) for _ in range(4))


def describe_device(device: torch.device) -> dict:
    if device.type != "cuda":
        return {"name": "cpu", "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "free_bytes": free_bytes(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "free_bytes": free_bytes(device),
        "peak_flops_per_second": peak_flops_by_name(properties.name),
    }


def describe_software() -> dict[str, str | None]:
    """Versions of all that a figure can depend on; None for what is not installed."""
    versions: dict[str, str | None] = {"mive": __version__, "python": platform.python_version(), "system": platform.platform(), "torch": torch.__version__}
    versions |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "cudnn": str(torch.backends.cudnn.version() or "") or None}
    for name in ("transformers", "diffusers", "triton", "sageattention"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
