"""Estimates the tokens, memory and time of an edit before it runs."""

import math
import time

import comfy.model_management
import torch

from ...mive_core.config import VLM_INTERMEDIATE_SIZES, MiVEConfig, latent_grid
from ...mive_core.cost.flops import Layout, block_flops, non_block_flops
from ...mive_core.cost.memory import vae_decode_bytes, vlm_bytes
from ...mive_core.vae import LATENT_CHANNELS
from .model import config_of

VLM_TOKEN_CELLS = 16  # latent cells covered by one VLM token, which is 32 x 32 pixels
CPU_MATRIX_SIDE, GPU_MATRIX_SIDE = 512, 8192  # of the square matrices that measure a device's speed


def describe_cost(num_frames: int, height: int, width: int, steps: int, patcher=None) -> list[str]:
    """Returns the lines of a cost report; steps 0 is the model's own number. Without a MODEL it only counts tokens."""
    config = MiVEConfig() if patcher is None else config_of(patcher)
    cells = latent_grid(num_frames, height, width)
    grid, num_reference = config.patch_grid(*cells), cells[1] * cells[2] // VLM_TOKEN_CELLS
    layout = Layout(config.max_video_tokens + config.max_instruction_tokens + num_reference, grid)
    lines = [f"tokens: {math.prod(grid)} target, {grid[1] * grid[2]} reference, at most about {layout.num_condition} condition"]
    if patcher is None:
        return lines
    shape = [1, LATENT_CHANNELS, *cells]
    weights, activations = patcher.model_size(), patcher.model.memory_required(shape, {"condition": [[1, layout.num_condition, config.width]]})
    flops = config.num_blocks * block_flops(config, layout.num_tokens) + non_block_flops(config, layout, ours=True)
    seconds = flops / measure_speed(patcher.load_device, patcher.model.get_dtype_inference())
    free = comfy.model_management.get_free_memory(patcher.load_device)
    return [
        *lines,
        f"memory: {_format_bytes(weights)} of weights and at most {_format_bytes(activations)} for one step; "
        f"{_format_bytes(free)} free on {patcher.load_device}",
        describe_vlm_and_vae(config, num_frames, height, width, layout.num_condition, config.max_video_tokens + num_reference),
        describe_time(seconds, steps, config),
    ]


def describe_time(seconds: float, steps: int, config: MiVEConfig) -> str:
    """Of one step's seconds; says which number of steps was assumed, which is not that of any sampler node."""
    num_steps = steps or config.steps
    source = "the number set here" if steps else "the model's own number"
    return f"time: at best {seconds:.2g} s a step, {num_steps * seconds:.2g} s for {num_steps} steps ({source}); twice that where cfg is not 1"


def describe_vlm_and_vae(config: MiVEConfig, num_frames: int, height: int, width: int, num_tokens: int, num_visual: int) -> str:
    """Describes the activation memory, in 16 bits, of the DiT's VLM while it encodes and of a VAE of Wan's own width while it decodes."""
    inner = VLM_INTERMEDIATE_SIZES.get(config.vlm_width, 4 * config.vlm_width)
    reading = vlm_bytes(config.vlm_width, inner, num_tokens, num_visual, 2, num_video=config.max_video_tokens)
    whole, tiled = (vae_decode_bytes(num_frames, height, width, 2, tiled=tiled) for tiled in (False, True))
    return (
        f"before and after: about {_format_bytes(reading)} beside {config.vlm}'s weights; "
        f"to decode with Wan's VAE {_format_bytes(whole)} whole, {_format_bytes(tiled)} in tiles"
    )


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the operations per second of one large matrix product, an upper bound for the model."""
    side = CPU_MATRIX_SIDE if comfy.model_management.is_device_cpu(device) else GPU_MATRIX_SIDE
    a = torch.ones(side, side, device=device, dtype=dtype)
    float((a @ a)[0, 0])  # warm-up; reading a number waits for the device
    start = time.perf_counter()
    float((a @ a)[0, 0])
    return 2 * side**3 / (time.perf_counter() - start)


def _format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MB"
