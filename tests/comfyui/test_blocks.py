"""Our block against ComfyUI's own WanAttentionBlock with its cross-attention silenced."""

import torch
from torch import nn

from mive_core.attention import torch_attention
from mive_core.dit.blocks import Block, Modulation
from mive_core.dit.rope import rotary_table

WIDTH, HEADS, FFN, GRID = 96, 2, 160, (3, 4, 6)


def randomise(module):
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + 0.05)
    return module


@torch.inference_mode()
def test_block_equals_comfyuis(comfyui):
    import comfy.ops
    from comfy.ldm.flux.layers import EmbedND
    from comfy.ldm.wan.model import WanAttentionBlock

    settings = {"operations": comfy.ops.disable_weight_init, "device": "cpu", "dtype": torch.float32}
    torch.manual_seed(0)
    theirs = randomise(WanAttentionBlock("t2v_cross_attn", WIDTH, FFN, HEADS, operation_settings=settings))
    nn.init.zeros_(theirs.cross_attn.o.weight)
    nn.init.zeros_(theirs.cross_attn.o.bias)
    ours = Block(WIDTH, HEADS, FFN, 1e-6, operations=nn, attention=torch_attention)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("cross_attn.", "norm3."))}
    ours.load_state_dict(state)  # Wan's spelling, key for key

    frames, rows, columns = GRID
    x, time = torch.randn(1, frames * rows * columns, WIDTH), torch.randn(1, 6, WIDTH)
    head_dim = WIDTH // HEADS
    axes = [head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)]
    ids = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in GRID), indexing="ij"), -1).reshape(1, -1, 3)
    freqs = EmbedND(dim=head_dim, theta=10000.0, axes_dim=axes)(ids).movedim(1, 2)
    expected = theirs(x, time, freqs, torch.randn(1, 5, WIDTH))
    got = ours(x, Modulation(time, time, 0), rotary_table(0, GRID, head_dim, 10000.0)[:, rows * columns :])
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.inference_mode()
def test_comfyuis_attention_fits_our_form(comfyui):
    from comfy.ldm.modules.attention import attention_pytorch, attention_sub_quad

    q, k, v = torch.randn(3, 2, 33, 64).unbind(0)
    for theirs in (attention_pytorch, attention_sub_quad):
        assert torch.allclose(theirs(q, k, v, heads=4), torch_attention(q, k, v, 4), atol=1e-5)
