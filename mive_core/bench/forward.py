"""A forward of the DiT on a card of any size: measured whole, or from a few blocks, whose number does not change what a step holds beside the weights.

L tokens of the DiT's sequence.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import MiVEConfig
from ..cost.flops import dit_flops
from ..cost.memory import activation_bytes, weight_bytes
from ..dit import MiVEDiT
from ..formats.float8 import to_float8
from ..formats.quantized_linear import MIN_CAPABILITY, can_multiply
from .against_diffusers import make_forward
from .card import attempt
from .models import FLOAT8, Workload, random_dit
from .stage import measure, shares_of_time, synchronize_after

FEW_BLOCKS = (1, 3)  # the times of two depths give that of a block, and that of what is outside the blocks
RESERVE = {"cuda": 1e9, "cpu": 2.5e8}  # bytes for workspaces of kernels, inputs and what the allocator does not use
FORMATS = ("bf16", "fp8", "fp8_sage")  # of the blocks' matrices; the last with 8-bit attention too, by sageattention
CALLS = 2 + 3  # of each depth at 3 repeats: warm-up and profile


@dataclass(frozen=True)
class Forward:
    """A DiT's forward in one of FORMATS. `whole`: with all blocks; otherwise from FEW_BLOCKS."""

    work: Workload
    format_name: str
    whole: bool = False

    @property
    def config(self) -> MiVEConfig:
        """The config of the deepest DiT that is measured."""
        return self.work.config if self.whole else replace(self.work.config, num_blocks=min(FEW_BLOCKS[-1], self.work.config.num_blocks))

    @property
    def needed_bytes(self) -> int:
        """Weights and one step by the memory model, and the reserve."""
        itemsize = self.work.dtype.itemsize
        step = activation_bytes(self.config, self.work.layout.num_tokens, itemsize)
        return round(self.weight_bytes(self.config) + step + RESERVE[self.work.device.type])

    @property
    def flops(self) -> float:
        """Operations of all forwards that the measurement takes."""
        if self.whole:
            return dit_flops(self.config, self.work.layout)
        depths = {min(blocks, self.config.num_blocks) for blocks in FEW_BLOCKS}
        return CALLS * sum(dit_flops(replace(self.config, num_blocks=blocks), self.work.layout) for blocks in depths)

    def weight_bytes(self, config: MiVEConfig) -> int:
        return weight_bytes(config, self.work.dtype.itemsize, 1 if self.format_name != "bf16" else None)

    def measure(self) -> dict:
        """Seconds and peak memory of a forward with all blocks, what they are from, and the memory model's bytes beside the measured."""
        float8 = self.format_name != "bf16"
        reason = why_not_multiplied(self.work.device) if float8 else ""
        work = replace(self.work, config=self.config, attention="sage" if self.format_name == "fp8_sage" else self.work.attention)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            model = random_dit(work, float8, multiplied=not reason)
            call = make_forward(model, work.layout)
            figures = measure(work, call, repeats=1, warm=False) if self.whole else measure(work, call)
            if not self.whole:
                profile = attempt(lambda: {"shares_of_time": shares_of_time(work, synchronize_after(work, call))}, work.device)
                figures |= {key: profile[key] for key in ("shares_of_time",) if key in profile} or {"profile": profile}
                figures |= self.extrapolate(figures["seconds"], work, model)
        weights = self.weight_bytes(self.work.config)
        step, counted_step = figures.pop("peak_bytes", None), activation_bytes(self.work.config, work.layout.num_tokens, work.dtype.itemsize)
        figures |= {
            "from": f"all {self.config.num_blocks} blocks" if self.whole else figures["from"],
            "size": list(work.size),
            "frames": work.num_frames,
            "tokens": work.layout.num_tokens,
            "flops": dit_flops(self.work.config, work.layout),
            "weight_bytes": weights,
            "step_bytes": step,
            "counted_step_bytes": counted_step,
            "peak_bytes": None if step is None else figures.pop("peak_bytes_in_all", weights + step) if self.whole else weights + step,
            "counted_peak_bytes": weights + counted_step,
        }
        figures.pop("peak_bytes_in_all", None)
        if float8:
            figures["multiplied"] = not reason
        if reason:
            figures["fallback"] = f"{reason}; the matrices are stored in float8 and scaled back at each use"
        messages = sorted({str(warning.message).splitlines()[0] for warning in caught if "attention" in str(warning.message)})
        return figures | ({"warnings": messages} if messages else {})

    def extrapolate(self, seconds: float, work: Workload, model: MiVEDiT) -> dict:
        """The seconds of the deeper model -> those of a block and of all blocks. Shortens the model to the lower depth."""
        few, deep = min(FEW_BLOCKS[0], work.config.num_blocks), work.config.num_blocks
        if deep == few:
            return {"from": f"all {deep} blocks"}
        model.blocks = model.blocks[:few]
        shallow_seconds = measure(work, make_forward(model, work.layout))["seconds"]
        block = max((seconds - shallow_seconds) / (deep - few), 0.0)
        outside = max(shallow_seconds - few * block, 0.0)
        total = self.work.config.num_blocks
        return {
            "from": f"{few} and {deep} blocks with weights of their own; a forward is what is outside the blocks and {total} times a block",
            "block_seconds": block,
            "seconds_outside_the_blocks": outside,
            "seconds": outside + total * block,
        }


def why_not_multiplied(device: torch.device) -> str:
    """Why the device cannot multiply float8 matrices; empty if it can."""
    if not can_multiply("fp8", device):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the card multiplies no float8 (compute capability {major}.{minor}, needed {'.'.join(map(str, MIN_CAPABILITY['fp8']))})"
    try:
        float8_product(torch.ones(32, 32, device=device, dtype=torch.bfloat16))()
    except RuntimeError as error:
        return f"torch multiplies no float8 here ({next(iter(str(error).splitlines()), '')})"
    return ""


def float8_product(a: torch.Tensor) -> Callable[[], torch.Tensor]:
    """(N, N) -> a call that multiplies it with itself in float8, with one scale each."""
    quantised, scale = to_float8(a, FLOAT8)
    return lambda: torch._scaled_mm(quantised, quantised.T, scale_a=scale.float(), scale_b=scale.float(), out_dtype=a.dtype)


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors can take: on a GPU with what torch has reserved and does not use; None if the system does not tell."""
    if device.type == "cuda":
        with suppress(RuntimeError):  # a card that has failed tells nothing any more
            return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return None
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
