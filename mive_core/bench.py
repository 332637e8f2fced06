"""Speed as a ratio: our DiT against another Wan, diffusers' WanTransformer3DModel unless told, in one process, interleaved.

Both have the same width, depth and number of tokens in self-attention; theirs also has its
cross-attention to 512 text tokens, which is counted in floating-point operations.
"""

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from .attention import attention_of
from .config import PRESETS, MiVEConfig
from .dit import MiVEDiT
from .errors import UserError

NUM_TEXT_TOKENS = 512  # what Wan's cross-attention reads


@dataclass(frozen=True)
class Layout:
    """How a number of tokens is spent; both models get num_tokens in self-attention."""

    num_condition: int
    grid: tuple[int, int, int]  # target frames, patch rows, patch columns

    @property
    def num_tokens(self) -> int:
        return self.num_condition + (self.grid[0] + 1) * self.grid[1] * self.grid[2]


def layout_for(num_tokens: int) -> Layout:
    """About num_tokens, a twentieth of them condition tokens as at 720p x 81."""
    num_frames = 7
    side = round(math.sqrt(0.95 * num_tokens / (num_frames + 1)))
    num_visual = (num_frames + 1) * side * side
    return Layout(max(num_tokens - num_visual, 1), (num_frames, side, side))


def block_flops(config: MiVEConfig, num_tokens: int) -> float:
    """Multiply-adds counted twice, of one of our blocks at batch 1."""
    width = config.width
    return 2 * num_tokens * (4 * width**2 + 2 * width * config.ffn_width) + 4 * num_tokens**2 * width


def cross_attention_flops(config: MiVEConfig, num_tokens: int) -> float:
    """What Wan's block does on top: queries and output over the video, keys and values over the text."""
    width = config.width
    return 4 * num_tokens * width**2 + 4 * NUM_TEXT_TOKENS * width**2 + 4 * num_tokens * NUM_TEXT_TOKENS * width


def edge_flops(config: MiVEConfig, layout: Layout, ours: bool) -> float:
    """Patch embedding, head and the projection of what conditions."""
    width, channels = config.width, config.latent_channels
    per_patch = math.prod(config.patch_size)
    rows = layout.grid[1] * layout.grid[2]
    if not ours:
        num_visual = layout.num_tokens
        return 4 * num_visual * per_patch * channels * width + 2 * NUM_TEXT_TOKENS * (config.vlm_width * width + width**2)
    embedded, target = (layout.grid[0] + 1) * rows, layout.grid[0] * rows
    context = 2 * layout.num_condition * (config.vlm_width * width + width**2)
    return 2 * per_patch * channels * width * (2 * embedded + target) + context


def dit_flops(config: MiVEConfig, layout: Layout) -> float:
    """One forward of our DiT at batch 1."""
    return config.num_blocks * block_flops(config, layout.num_tokens) + edge_flops(config, layout, ours=True)


def training_flops(config: MiVEConfig, layout: Layout, *, frozen: bool = False) -> float:
    """Forward and backward at batch 1, each once; `frozen`: no gradients of the weights, as where a LoRA is trained, itself not counted."""
    forward, attention = dit_flops(config, layout), config.num_blocks * 4 * layout.num_tokens**2 * config.width
    return 2 * (forward - attention) + 3 * attention if frozen else 3 * forward


def make_ours(config: MiVEConfig, layout: Layout, attention: str = "auto", compiled: bool = False):
    model = MiVEDiT(config, operations=torch.nn, attention=attention_of(attention)).eval()
    return forward_of(model.compile_blocks() if compiled else model, layout)


def forward_of(model: MiVEDiT, layout: Layout):
    """A call that runs the model once on random inputs of the layout, on its device and in its dtype."""
    config, like = model.config, model.patch_embedding.weight
    made = {"device": like.device, "dtype": like.dtype}
    (frames, rows, columns), channels = layout.grid, config.latent_channels
    noisy = torch.randn(1, channels, frames, 2 * rows, 2 * columns, **made)
    states = torch.randn(1, len(config.layers), layout.num_condition, config.vlm_width, **made)
    return lambda: model(noisy, noisy, noisy[:, :, :1], model.embed_condition(states), torch.full((1,), 0.5, device=like.device))


def make_diffusers(config: MiVEConfig, num_tokens: int):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=config.patch_size, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        in_channels=config.latent_channels, out_channels=config.latent_channels, text_dim=config.vlm_width,
        freq_dim=config.freq_dim, ffn_dim=config.ffn_width, num_layers=config.num_blocks, eps=config.eps,
        rope_max_seq_len=max(1024, num_tokens)).eval()
    # the same number of tokens, one patch row of them: the arithmetic does not depend on the grid
    noisy = torch.randn(1, config.latent_channels, 1, 2, 2 * num_tokens)
    text = torch.randn(1, NUM_TEXT_TOKENS, config.vlm_width)
    return lambda: model(noisy, torch.full((1,), 500.0), text, return_dict=False)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def bench_dit(preset: str, *, tokens: int, blocks: int | None = None, repeats: int = 7, threads: int | None = None,
              make_ours=make_ours, make_rival=make_diffusers, rival: str = "diffusers") -> dict:
    """Interleaved forwards at batch 1, fp32, CPU -> medians, the time ratio, the FLOP ratio and their quotient (goal: <= 1.03).

    `make_ours` and `make_rival` take a config and a Layout, or a number of tokens, and return the call to time.
    """
    if preset not in PRESETS:
        raise UserError("unknown preset", where="preset", got=preset, expected=", ".join(PRESETS))
    if threads:
        torch.set_num_threads(threads)
    config = replace(PRESETS[preset], num_blocks=blocks or PRESETS[preset].num_blocks)
    layout = layout_for(tokens)
    calls = {"ours": make_ours(config, layout), rival: make_rival(config, layout.num_tokens)}
    for call in calls.values():
        call()
    seconds = {name: [] for name in calls}
    for _ in tqdm(range(repeats), desc=f"{preset}, {layout.num_tokens} tokens"):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    n = layout.num_tokens
    flops = {"ours": dit_flops(config, layout),
             rival: config.num_blocks * (block_flops(config, n) + cross_attention_flops(config, n)) + edge_flops(config, layout, ours=False)}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    time_ratio, flop_ratio = medians["ours"] / medians[rival], flops["ours"] / flops[rival]
    paired = statistics.median(a / b for a, b in zip(seconds["ours"], seconds[rival]))
    return {"preset": preset, "blocks": config.num_blocks, "tokens": n, "threads": torch.get_num_threads(), "repeats": repeats,
            "seconds": medians, "flops": flops, "gflops_per_second": {k: flops[k] / medians[k] / 1e9 for k in flops},
            "time_ratio": time_ratio, "median_of_paired_ratios": paired, "flop_ratio": flop_ratio,
            "time_over_flop_ratio": time_ratio / flop_ratio, "goal": 1.03}
