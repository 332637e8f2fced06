"""What an edit will cost, before it is run: tokens, memory, time."""

import math
import time

import comfy.model_management
import torch

from ...mive_core.config import VLM_FEED_FORWARD, MiVEConfig
from ...mive_core.cost.flops import Layout, block_flops, edge_flops
from ...mive_core.cost.memory import vae_decode_bytes, vlm_bytes
from ...mive_core.vae import LATENT_CHANNELS, SPATIAL_FACTOR, TEMPORAL_FACTOR

VLM_TOKEN_CELLS = 16  # latent cells under one of the VLM's tokens, 32 x 32 pixels
SIDE = 512  # of the matrices that the device's speed is measured with on a CPU
GPU_SIDE = 8192


def describe_cost(num_frames: int, height: int, width: int, steps: int, patcher=None) -> list[str]:
    """Lines of a report. Without a MODEL only the tokens are counted."""
    config = MiVEConfig() if patcher is None else patcher.model.config
    cells = ((num_frames - 1) // TEMPORAL_FACTOR + 1, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR)
    grid, num_reference = config.patch_grid(*cells), cells[1] * cells[2] // VLM_TOKEN_CELLS
    layout = Layout(config.max_video_tokens + config.max_instruction_tokens + num_reference, grid)
    lines = [f"tokens: {math.prod(grid)} target, {grid[1] * grid[2]} reference, at most about {layout.num_condition} condition"]
    if patcher is None:
        return lines
    shape = [1, LATENT_CHANNELS, *cells]
    weights, activations = patcher.model_size(), patcher.model.memory_required(shape, {"condition": [[1, layout.num_condition, config.width]]})
    flops = config.num_blocks * block_flops(config, layout.num_tokens) + edge_flops(config, layout, ours=True)
    seconds = flops / measure_speed(patcher.load_device, patcher.model.get_dtype_inference())
    free = comfy.model_management.get_free_memory(patcher.load_device)
    return [
        *lines,
        f"memory: {_size(weights)} of weights and at most {_size(activations)} for one step; {_size(free)} free on {patcher.load_device}",
        describe_ends(config, num_frames, height, width, layout.num_condition, config.max_video_tokens + num_reference),
        f"time: at best {seconds:.2g} s a step, {steps * seconds:.2g} s for {steps} steps; twice that where cfg is not 1",
    ]


def describe_ends(config: MiVEConfig, num_frames: int, height: int, width: int, num_tokens: int, num_visual: int) -> str:
    """What reading and decoding hold, in 16 bits: of the VLM that the DiT names and of a VAE of Wan's own width."""
    inner = VLM_FEED_FORWARD.get(config.vlm_width, 4 * config.vlm_width)
    reading = vlm_bytes(config.vlm_width, inner, num_tokens, num_visual, 2, num_video=config.max_video_tokens)
    whole, tiled = (vae_decode_bytes(num_frames, height, width, 2, tiled=tiled) for tiled in (False, True))
    return f"before and after: about {_size(reading)} beside {config.vlm}'s weights; to decode with Wan's VAE {_size(whole)} whole, {_size(tiled)} in tiles"


def measure_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product, which is the most that the model can reach."""
    side = SIDE if comfy.model_management.is_device_cpu(device) else GPU_SIDE
    a = torch.ones(side, side, device=device, dtype=dtype)
    float((a @ a)[0, 0])  # warms up; reading a number waits for the device
    start = time.perf_counter()
    float((a @ a)[0, 0])
    return 2 * side**3 / (time.perf_counter() - start)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MB"
