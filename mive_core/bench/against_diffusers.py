"""The speed of our DiT relative to another Wan implementation, by default diffusers' WanTransformer3DModel; interleaved in one process.

Both have the same width, depth and number of tokens in self-attention. The other also has cross-attention to 512 text tokens, which the
count of floating-point operations includes.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from ..attention import get_attention
from ..config import PRESETS, MiVEConfig
from ..cost.flops import NUM_TEXT_TOKENS, Layout, block_flops, cross_attention_flops, dit_flops, layout_for, non_block_flops
from ..dit import MiVEDiT
from ..errors import UserError


def make_ours(config: MiVEConfig, layout: Layout, attention: str = "auto", compiled: bool = False):
    model = MiVEDiT(config, operations=torch.nn, attention=get_attention(attention)).eval()
    return make_forward(model.compile_blocks() if compiled else model, layout)


def make_forward(model: MiVEDiT, layout: Layout):
    """Returns a call that runs the model once on random inputs of the layout, on the model's device and in its dtype."""
    config, weight = model.config, model.patch_embedding.weight
    options = {"device": weight.device, "dtype": weight.dtype}
    noisy = torch.randn(1, config.latent_channels, *(n * p for n, p in zip(layout.grid, config.patch_size)), **options)
    states = torch.randn(1, len(config.layers), layout.num_condition, config.vlm_width, **options)
    return lambda: model(noisy, noisy, noisy[:, :, :1], model.embed_condition(states), torch.full((1,), 0.5, device=weight.device))


def make_diffusers(config: MiVEConfig, num_tokens: int):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        text_dim=config.vlm_width,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_width,
        num_layers=config.num_blocks,
        eps=config.eps,
        rope_max_seq_len=max(1024, num_tokens),
    ).eval()
    # the same number of tokens in a single patch row: the arithmetic does not depend on the grid
    frames, rows, columns = config.patch_size
    noisy = torch.randn(1, config.latent_channels, frames, rows, columns * num_tokens)
    text = torch.randn(1, NUM_TEXT_TOKENS, config.vlm_width)
    return lambda: model(noisy, torch.full((1,), 500.0), text, return_dict=False)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def bench_dit(
    preset: str,
    *,
    tokens: int,
    blocks: int | None = None,
    repeats: int = 7,
    threads: int | None = None,
    make_ours=make_ours,
    make_baseline=make_diffusers,
    baseline: str = "diffusers",
) -> dict:
    """Interleaved forward passes at batch 1, fp32, CPU -> medians, the time ratio, the FLOP ratio and their quotient (goal: <= 1.03).

    `make_ours` takes a config and a Layout, `make_baseline` a config and a number of tokens; both return the call to time.
    """
    if preset not in PRESETS:
        raise UserError("unknown preset", where="preset", got=preset, expected=", ".join(PRESETS))
    if threads:
        torch.set_num_threads(threads)
    config = replace(PRESETS[preset], num_blocks=blocks or PRESETS[preset].num_blocks)
    layout = layout_for(tokens)
    calls = {"ours": make_ours(config, layout), baseline: make_baseline(config, layout.num_tokens)}
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(repeats), desc=f"{preset}, {layout.num_tokens} tokens"):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    n = layout.num_tokens
    flops = {
        "ours": dit_flops(config, layout),
        baseline: config.num_blocks * (block_flops(config, n) + cross_attention_flops(config, n)) + non_block_flops(config, layout, ours=False),
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    time_ratio, flop_ratio = medians["ours"] / medians[baseline], flops["ours"] / flops[baseline]
    paired = statistics.median(a / b for a, b in zip(seconds["ours"], seconds[baseline]))
    return {
        "preset": preset,
        "blocks": config.num_blocks,
        "tokens": n,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "seconds": medians,
        "flops": flops,
        "gflops_per_second": {k: flops[k] / medians[k] / 1e9 for k in flops},
        "time_ratio": time_ratio,
        "median_of_paired_ratios": paired,
        "flop_ratio": flop_ratio,
        "time_over_flop_ratio": time_ratio / flop_ratio,
        "goal": 1.03,
    }
