"""One stage of an edit at a size: time, memory, operations, their share of what the machine can do, and where the time goes.

F frames; L tokens of the DiT's sequence.
"""

import re
import statistics
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from ..cost.flops import dit_flops
from ..flow import schedule
from ..vae import LATENT_CHANNELS
from .against_diffusers import forward_of, timed
from .memory_counter import Counted
from .models import ATTENTION_RANGE, Workload, inputs_of, random_dit, random_network, random_pipeline, random_vae, random_vlm, request_of, vlm_flops

SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that a device's speed is measured with
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes
MATRIX_PRODUCT = re.compile(r"(aten|mkl|mkldnn)::(\w*mm\w*|\w*linear\w*|\w*conv\w*)")
ATTENTION = re.compile(r"scaled_dot_product|sage|flash|fmha")
PAPER_FORWARDS = 28  # what the paper's 328 s come to


def bench_stage(stage: str, work: Workload, **options) -> dict:
    """What the workload is, the machine's speed, and the stage's figures. stage: one of STAGES, with the options of its function."""
    with torch.inference_mode():
        speed = measure_speed(work)
        figures = STAGES[stage](work, **options)
    add_shares(figures, speed)
    return {"stage": stage, **work.describes, "speed": speed, **figures}


def add_shares(figures: dict, speed: dict) -> None:
    """Beside every number of operations and seconds: operations a second, and how much of the time the machine's own speed explains.

    The roofline is the longer of the operations at the speed of a large matrix product and, where bytes that must be read are
    known, those at the speed of a copy.
    """
    for found in (figures, *(value for value in figures.values() if isinstance(value, dict))):
        if "flops" in found and "seconds" in found:
            found["flops_per_second"] = found["flops"] / found["seconds"]
            if speed.get("flops_per_second"):
                found["roofline_seconds"] = max(found["flops"] / speed["flops_per_second"], found.get("weight_bytes", 0) / speed["copied_bytes_per_second"])
                found["share_of_roofline"] = found["roofline_seconds"] / found["seconds"]


def measure(work: Workload, call: Callable[[], object], *, repeats: int | None = None, warm: bool = True, profiled: bool = False) -> dict:
    """One call to warm up, then the median of the repeats -> seconds and the most bytes that a call held beside what stood before.

    On a GPU the allocator says the bytes, on a CPU tensors are counted in one call more, unless they are compiled. `profiled` adds
    where the time of one call more goes.
    """
    cuda, waited = work.device.type == "cuda", waiting(work, call)
    if warm:
        waited()
    before = 0
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = {"seconds": statistics.median(timed(waited) for _ in range(repeats or work.repeats))}
    if cuda:
        found |= {"peak_bytes": torch.cuda.max_memory_allocated() - before, "peak_bytes_in_all": torch.cuda.max_memory_allocated()}
    elif not work.compiled:
        with Counted() as counted:
            call()
        found["peak_bytes"] = counted.peak
    return found | ({"shares_of_time": shares_of_time(work, waited)} if profiled else {})


def shares_of_time(work: Workload, call: Callable[[], object]) -> dict[str, float]:
    """Of one call under the profiler: attention, matrix products outside it (convolutions too), the rest. They sum to 1."""
    cuda = work.device.type == "cuda"
    with profile(use_device="cuda" if cuda else None, use_kineto=cuda) as found:
        call()
    spent = {"attention": 0.0, "matrix_products": 0.0, "rest": 0.0}
    for event in found.function_events:
        if event.device_type == DeviceType.CPU:  # a kernel's time is also told of the operation that started it
            spent[kind_of(event)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()} if total else {}


def kind_of(event) -> str:
    """Of a profiler's event, by its name and those of the events around it."""
    around = event
    while around is not None:
        if around.name == ATTENTION_RANGE or ATTENTION.search(around.name):
            return "attention"
        around = around.cpu_parent
    return "matrix_products" if MATRIX_PRODUCT.fullmatch(event.name) else "rest"


def measure_speed(work: Workload) -> dict:
    """A large square matrix product and a copy: what everything else is held against."""
    side = SIDES[work.device.type]
    a = torch.randn(side, side, device=work.device, dtype=work.dtype)
    product = min(timed_once(work, lambda: a @ a) for _ in range(5))
    block = torch.empty(COPIED[work.device.type], device=work.device, dtype=torch.uint8)
    return {"flops_per_second": 2 * side**3 / product, "copied_bytes_per_second": 2 * block.numel() / min(timed_once(work, block.clone) for _ in range(5))}


def waiting(work: Workload, call: Callable[[], object]) -> Callable[[], None]:
    """The call, which then ends with the device's work."""

    def waited() -> None:
        call()
        if work.device.type == "cuda":
            torch.cuda.synchronize()

    return waited


def timed_once(work: Workload, call: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    return timed(waiting(work, call))


def measure_dit(work: Workload, float8: bool = False) -> dict:
    """One forward of the whole DiT, the condition tokens' projection included."""
    model = random_dit(work, float8)
    return measure(work, forward_of(model, work.layout), profiled=True) | {
        "flops": dit_flops(work.config, work.layout),
        "weight_bytes": sum(p.numel() * p.itemsize for p in (*model.parameters(), *model.buffers())),
    }


def measure_vlm(work: Workload) -> dict:
    """The chosen layers of one prompt that holds the whole edit's clip."""
    vlm = random_vlm(work)
    inputs = inputs_of(work, vlm.processor)
    return measure(work, lambda: vlm.encode(inputs, work.config.resolved_layers), profiled=True) | {
        "vlm_tokens": inputs.input_ids.shape[1],
        "flops": vlm_flops(work.vlm_values, inputs),
        "weight_bytes": sum(p.numel() * p.itemsize for p in vlm.model.parameters()),
    }


def measure_vae(work: Workload) -> dict:
    """Encoding the source, and decoding whole and in tiles. Warmed up on one frame only: a large clip takes long."""
    vae = random_vae(work)
    latents = torch.randn(1, LATENT_CHANNELS, *work.cells, device=work.device)
    video = request_of(work).source.frames
    vae.decode(latents[:, :, :1])
    cold = {"warm": False, "profiled": work.device.type == "cpu"}  # a profile costs one call more, half a minute at 720p on a GPU
    operations = vae_flops(work)
    found = {
        "encode": measure(work, lambda: vae.encode(video), **cold) | {"flops": operations["encode"]},
        "decode": measure(work, lambda: vae.decode(latents), **cold) | {"flops": operations["decode"]},
    }
    vae.network.enable_tiling()
    return found | {"decode_tiled": measure(work, lambda: vae.decode(latents), **cold)}


def vae_flops(work: Workload) -> dict[str, float]:
    """Operations of encoding and decoding, counted on the meta device by the shapes of all convolutions."""
    network, counts = random_network(work), {}
    for name, call in (
        ("encode", lambda: network.encode(torch.empty(1, 3, work.num_frames, *work.size[::-1], device="meta"))),
        ("decode", lambda: network.decode(torch.empty(1, LATENT_CHANNELS, *work.cells, device="meta"))),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts[name] = counter.get_total_flops()
    return counts


def measure_edit(work: Workload, steps: int | None = None) -> dict:
    """A whole edit of that many steps (None: the preset's own), and its stages one by one."""
    pipeline, request = random_pipeline(work), request_of(work)
    steps = steps or work.config.steps
    condition, latents = pipeline.vlm.condition(request, work.config), pipeline.encode(request)
    times = schedule(steps, work.config.shift)
    pipeline.denoise(latents, [condition], times[-2:], 1.0, 0)
    once = {"repeats": 1, "warm": False}
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
