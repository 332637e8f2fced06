"""Speed as a ratio: our DiT against another Wan, diffusers' WanTransformer3DModel unless told, in one process, interleaved.

Both have the same width, depth and number of tokens in self-attention; theirs also has its
cross-attention to 512 text tokens, which is counted in floating-point operations.
"""

import statistics
import time
from dataclasses import replace

import torch
from tqdm import tqdm

from ..attention import attention_of
from ..config import PRESETS, MiVEConfig
from ..cost.flops import NUM_TEXT_TOKENS, Layout, block_flops, cross_attention_flops, dit_flops, edge_flops, layout_for
from ..dit import MiVEDiT
from ..errors import UserError


def make_ours(config: MiVEConfig, layout: Layout, attention: str = "auto", compiled: bool = False):
    model = MiVEDiT(config, operations=torch.nn, attention=attention_of(attention)).eval()
    return forward_of(model.compile_blocks() if compiled else model, layout)


def forward_of(model: MiVEDiT, layout: Layout):
    """A call that runs the model once on random inputs of the layout, on its device and in its dtype."""
    config, like = model.config, model.patch_embedding.weight
    made = {"device": like.device, "dtype": like.dtype}
    noisy = torch.randn(1, config.latent_channels, *(n * p for n, p in zip(layout.grid, config.patch_size)), **made)
    states = torch.randn(1, len(config.layers), layout.num_condition, config.vlm_width, **made)
    return lambda: model(noisy, noisy, noisy[:, :, :1], model.embed_condition(states), torch.full((1,), 0.5, device=like.device))


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
    # the same number of tokens, one patch row of them: the arithmetic does not depend on the grid
    frames, rows, columns = config.patch_size
    noisy = torch.randn(1, config.latent_channels, frames, rows, columns * num_tokens)
    text = torch.randn(1, NUM_TEXT_TOKENS, config.vlm_width)
    return lambda: model(noisy, torch.full((1,), 500.0), text, return_dict=False)


def timed(call) -> float:
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
    make_rival=make_diffusers,
    rival: str = "diffusers",
) -> dict:
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
    flops = {
        "ours": dit_flops(config, layout),
        rival: config.num_blocks * (block_flops(config, n) + cross_attention_flops(config, n)) + edge_flops(config, layout, ours=False),
    }
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    time_ratio, flop_ratio = medians["ours"] / medians[rival], flops["ours"] / flops[rival]
    paired = statistics.median(a / b for a, b in zip(seconds["ours"], seconds[rival]))
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
