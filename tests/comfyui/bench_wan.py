"""Our DiT as the pack builds it against ComfyUI's WanModel; writes JSON. Not a test: times belong into a benchmark.

python tests/comfyui/bench_wan.py --comfyui ~/comfy/ComfyUI --preset 1.3b --blocks 2 --tokens 2048 --output FILE.json
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from mive_core.bench.against_diffusers import bench_dit, make_forward
from mive_core.config import MiVEConfig
from mive_core.cost.flops import NUM_TEXT_TOKENS, Layout
from mive_core.dit import MiVEDiT


def make_ours(config: MiVEConfig, layout: Layout):
    import comfy.ops
    from comfy.ldm.modules.attention import optimized_attention

    return make_forward(filled(MiVEDiT(config, operations=comfy.ops.disable_weight_init, attention=optimized_attention)), layout)


def make_wan(config: MiVEConfig, num_tokens: int):
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = filled(
        WanModel(
            dim=config.width,
            ffn_dim=config.ffn_width,
            freq_dim=config.freq_dim,
            text_dim=config.vlm_width,
            num_heads=config.num_heads,
            num_layers=config.num_blocks,
            in_dim=config.latent_channels,
            out_dim=config.latent_channels,
            device="cpu",
            dtype=torch.float32,
            operations=comfy.ops.disable_weight_init,
        )
    )
    noisy = torch.randn(1, config.latent_channels, 1, 2, 2 * num_tokens)
    text = torch.randn(1, NUM_TEXT_TOKENS, config.vlm_width)
    return lambda: model(noisy, torch.full((1,), 500.0), text)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """ComfyUI's layers start as uninitialised memory, whose odd numbers could slow a CPU down."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comfyui", type=Path, default=Path.home() / "comfy" / "ComfyUI")
    parser.add_argument("--preset", default="1.3b")
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    sys.path.insert(0, str(options.comfyui.expanduser()))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args

    args.cpu = True
    figures = bench_dit(
        options.preset,
        tokens=options.tokens,
        blocks=options.blocks,
        repeats=options.repeats,
        threads=options.threads,
        make_ours=make_ours,
        make_baseline=make_wan,
        baseline="comfyui",
    )
    command = (
        f"python tests/comfyui/bench_wan.py --preset {options.preset}"
        + (f" --blocks {options.blocks}" if options.blocks else "")
        + f" --tokens {options.tokens} --repeats {options.repeats}"
        + (f" --threads {options.threads}" if options.threads else "")
    )
    options.output.write_text(json.dumps({**figures, "command": f"{command} --output {options.output}"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
