"""Benchmarks one stage of an edit: time, memory, operations, the share of the machine's peak, and where the time goes.

F frames; L tokens of the DiT's sequence.
"""

import re
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from ..cost.flops import dit_flops
from ..delivery import deliver, deliver_stream
from ..flow import schedule
from ..vae import LATENT_CHANNELS, VAE
from .against_diffusers import make_forward, timed
from .memory_counter import MemoryCounter
from .models import ATTENTION_RANGE, Workload, make_request, make_vlm_inputs, random_dit, random_network, random_pipeline, random_vae, random_vlm, vlm_flops

MATRIX_SIDES = {"cuda": 8192, "cpu": 1024}  # sides of the matrices that measure a device's speed
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
MATRIX_PRODUCT = re.compile(r"(aten|mkl|mkldnn)::(\w*mm\w*|\w*linear\w*|\w*conv\w*)")
ATTENTION = re.compile(r"scaled_dot_product|sage|flash|fmha")
PAPER_FORWARDS = 28  # number of forwards that the paper's 328 s amount to


def bench_stage(stage: str, work: Workload, **options) -> dict:
    """Reports the workload, the machine's speed and the stage's figures. stage: one of STAGES; options: those of its function."""
    with torch.inference_mode():
        speed = measure_speed(work)
        figures = STAGES[stage](work, **options)
    add_shares(figures, speed)
    return {"stage": stage, **work.description, "speed": speed, **figures}


def add_shares(figures: dict, speed: dict) -> None:
    """Adds operations per second and the share of the roofline wherever operations and seconds are given.

    The roofline is the longer of two times: the operations at the speed of a large matrix product and, if the number of bytes that must
    be read is known, those bytes at the speed of a copy.
    """
    for entry in (figures, *(value for value in figures.values() if isinstance(value, dict))):
        if "flops" in entry and "seconds" in entry:
            entry["flops_per_second"] = entry["flops"] / entry["seconds"]
            if speed.get("flops_per_second"):
                entry["roofline_seconds"] = max(entry["flops"] / speed["flops_per_second"], entry.get("weight_bytes", 0) / speed["copied_bytes_per_second"])
                entry["share_of_roofline"] = entry["roofline_seconds"] / entry["seconds"]


def measure(work: Workload, call: Callable[[], object], *, repeats: int | None = None, warm: bool = True, profiled: bool = False) -> dict:
    """One call to warm up, then the median of the repeats -> seconds, and the peak bytes of a call above what was allocated before.

    On a GPU the allocator reports the bytes; on a CPU one more call counts tensors, unless the model is compiled. `profiled` adds one more
    call's shares of time.
    """
    cuda, synchronized = work.device.type == "cuda", synchronize_after(work, call)
    if warm:
        synchronized()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    figures = {"seconds": statistics.median(timed(synchronized) for _ in range(repeats or work.repeats))}
    if cuda:
        figures |= {"peak_bytes": torch.cuda.max_memory_allocated() - before, "peak_bytes_in_all": torch.cuda.max_memory_allocated()}
    elif not work.compiled:
        with MemoryCounter() as counter:
            call()
        figures["peak_bytes"] = counter.peak
    return figures | ({"shares_of_time": shares_of_time(work, synchronized)} if profiled else {})


def shares_of_time(work: Workload, call: Callable[[], object]) -> dict[str, float]:
    """Profiles one call -> the shares of attention, of other matrix products (including convolutions) and of the rest. They sum to 1."""
    cuda = work.device.type == "cuda"
    with profile(use_device="cuda" if cuda else None, use_kineto=cuda) as profiler:
        call()
    spent = {"attention": 0.0, "matrix_products": 0.0, "rest": 0.0}
    for event in profiler.function_events:
        if event.device_type == DeviceType.CPU:  # operations include the time of the kernels that they launch
            spent[classify(event)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()} if total else {}


def classify(event) -> str:
    """The kind of a profiler event, by its name and the names of its parents."""
    parent = event
    while parent is not None:
        if parent.name == ATTENTION_RANGE or ATTENTION.search(parent.name):
            return "attention"
        parent = parent.cpu_parent
    return "matrix_products" if MATRIX_PRODUCT.fullmatch(event.name) else "rest"


def measure_speed(work: Workload) -> dict:
    """The speed of a large square matrix product and of a copy, the reference for all other figures."""
    side = MATRIX_SIDES[work.device.type]
    a = torch.randn(side, side, device=work.device, dtype=work.dtype)
    product = min(synchronized_seconds(work, lambda: a @ a) for _ in range(5))
    block = torch.empty(COPIED_BYTES[work.device.type], device=work.device, dtype=torch.uint8)
    return {
        "flops_per_second": 2 * side**3 / product,
        "copied_bytes_per_second": 2 * block.numel() / min(synchronized_seconds(work, block.clone) for _ in range(5)),
    }


def synchronize_after(work: Workload, call: Callable[[], object]) -> Callable[[], None]:
    """The call, followed by a synchronization with the device."""

    def synchronized() -> None:
        call()
        if work.device.type == "cuda":
            torch.cuda.synchronize()

    return synchronized


def synchronized_seconds(work: Workload, call: Callable[[], object]) -> float:
    """Seconds of a call, including the device's work."""
    return timed(synchronize_after(work, call))


def measure_dit(work: Workload, float8: bool = False) -> dict:
    """One forward pass of the whole DiT, including the projection of the condition tokens."""
    model = random_dit(work, float8)
    return measure(work, make_forward(model, work.layout), profiled=True) | {
        "flops": dit_flops(work.config, work.layout),
        "weight_bytes": sum(p.numel() * p.itemsize for p in (*model.parameters(), *model.buffers())),
    }


def measure_vlm(work: Workload) -> dict:
    """The VLM's forward pass on the prompt of the whole edit."""
    vlm = random_vlm(work)
    inputs = make_vlm_inputs(work, vlm.processor)
    return measure(work, lambda: vlm.encode(inputs, work.config.resolved_layers), profiled=True) | {
        "vlm_tokens": inputs.input_ids.shape[1],
        "flops": vlm_flops(work.vlm_config, inputs),
        "weight_bytes": sum(p.numel() * p.itemsize for p in vlm.model.parameters()),
    }


def measure_vae(work: Workload) -> dict:
    """Encoding the source, decoding whole, in pieces and in tiles, and delivering the decoded frames whole and in pieces.

    Warms up on a single frame, because a large clip takes long.
    """
    vae = random_vae(work)
    latents = torch.randn(1, LATENT_CHANNELS, *work.latent_grid, device=work.device)
    video = make_request(work).source.frames
    source = partial(repeat, torch.rand(*work.size[::-1], 3), work.num_frames)
    vae.decode(latents[:, :, :1])
    cold = {"warm": False, "profiled": work.device.type == "cpu"}  # a profile takes one more call, half a minute at 720p on a GPU
    operations = vae_flops(work)
    figures = {
        "encode": measure(work, lambda: vae.encode(video), **cold) | {"flops": operations["encode"]},
        "decode": measure(work, lambda: vae.decode(latents), **cold) | {"flops": operations["decode"]},
        "decode_in_pieces": measure(work, lambda: exhaust(vae.decode_pieces(latents)), warm=False),
        "deliver": measure(work, lambda: exhaust(deliver(source(), vae.decode(latents), vae.decode(latents))), warm=False),
        "deliver_in_pieces": measure(work, lambda: exhaust(deliver_stream(source(), decoded_pairs(vae, latents), work.num_frames)), warm=False),
    }
    vae.network.enable_tiling()
    return figures | {"decode_tiled": measure(work, lambda: vae.decode(latents), **cold)}


def decoded_pairs(vae: VAE, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Decodes an edit and a source, the same latents here, in turns."""
    for edited, round_trip in zip(vae.decode_pieces(latents), vae.decode_pieces(latents)):
        yield from zip(edited, round_trip)


def exhaust(frames: Iterable) -> None:
    """Takes every frame and keeps none."""
    deque(frames, maxlen=0)


def vae_flops(work: Workload) -> dict[str, float]:
    """Operations of encoding and decoding, counted on the meta device from the shapes of all convolutions."""
    network, counts = random_network(work), {}
    for name, call in (
        ("encode", lambda: network.encode(torch.empty(1, 3, work.num_frames, *work.size[::-1], device="meta"))),
        ("decode", lambda: network.decode(torch.empty(1, LATENT_CHANNELS, *work.latent_grid, device="meta"))),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops()
    return counts


def measure_edit(work: Workload, steps: int | None = None) -> dict:
    """A whole edit of `steps` steps (None: the preset's default), and each of its stages."""
    pipeline, request = random_pipeline(work), make_request(work)
    steps = steps or work.config.steps
    condition, latents = pipeline.vlm.condition(request, work.config), pipeline.encode(request)
    times = schedule(steps, work.config.shift)
    pipeline.denoise(latents, [condition], times[-2:], 1.0, 0)
    once: dict[str, Any] = {"repeats": 1, "warm": False}
    return {
        "steps": steps,
        "vlm": measure(work, lambda: pipeline.vlm.condition(request, work.config), **once),
        "encode": measure(work, lambda: pipeline.encode(request), **once),
        "denoise": measure(work, lambda: pipeline.denoise(latents, [condition], times, 1.0, 0), **once)
        | {"flops": steps * dit_flops(work.config, work.layout)},
        "decode": measure(work, lambda: pipeline.vae.decode(latents.source), **once),
        "whole": measure(work, lambda: pipeline.edit(request, steps=steps), **once),
    }


STAGES = {"dit": measure_dit, "vlm": measure_vlm, "vae": measure_vae, "edit": measure_edit}
