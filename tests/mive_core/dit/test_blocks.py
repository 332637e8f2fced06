"""Our block against diffusers' WanTransformerBlock, and what each segment is modulated by."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from torch import nn

from mive_core.attention import torch_attention
from mive_core.dit.blocks import Block, Modulation, gated_add, modulate
from mive_core.dit.rope import rotary_table
from mive_core.formats.checkpoint import WAN_TO_DIFFUSERS, rename_keys

WIDTH, HEADS, FFN = 96, 2, 160


def randomise(module, scale=0.2):
    """Non-zero everywhere: a zero weight would hide a wrong path."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * scale + 0.05)
    return module


def make_block():
    torch.manual_seed(0)
    return randomise(Block(WIDTH, HEADS, FFN, 1e-6, operations=nn, attention=torch_attention))


@pytest.mark.parametrize("grid", [(3, 4, 6), (5, 2, 2)])
def test_block_equals_diffusers_with_its_cross_attention_silenced(grid):
    ours, theirs = make_block(), randomise(WanTransformerBlock(WIDTH, FFN, HEADS))
    state = rename_keys({f"blocks.0.{k}": v for k, v in ours.state_dict().items()}, WAN_TO_DIFFUSERS)
    report = theirs.load_state_dict({k.removeprefix("blocks.0."): v for k, v in state.items()}, strict=False)
    assert not report.unexpected_keys and all(k.startswith("attn2.") for k in report.missing_keys)
    with torch.no_grad():
        for p in theirs.attn2.to_out[0].parameters():
            p.zero_()
    frames, rows, columns = grid
    tokens = frames * rows * columns
    x, time = torch.randn(2, tokens, WIDTH), torch.randn(2, 6, WIDTH)
    # no condition and no reference: the rows of the table after the reference frame
    rotary = rotary_table(0, grid, WIDTH // HEADS, 10000.0)[:, rows * columns :]
    cos_sin = WanRotaryPosEmbed(WIDTH // HEADS, (1, 1, 1), 64)(torch.zeros(1, 1, *grid))
    expected = theirs(x, torch.randn(2, 7, WIDTH), time, cos_sin)
    got = ours(x, Modulation(time[:1], time, 0), rotary)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (got - x).abs().max() > 0.1  # the block does something


def test_clean_tokens_are_modulated_by_the_clean_time_alone():
    block, rotary = make_block(), rotary_table(3, (2, 2, 2), WIDTH // HEADS, 10000.0)
    x = torch.randn(1, 3 + 12, WIDTH)
    clean, target = torch.randn(1, 6, WIDTH), torch.randn(1, 6, WIDTH)
    modulated = modulate(x, Modulation(clean[:, :1], target[:, :1], 7), Modulation(clean[:, 1:2], target[:, 1:2], 7))
    assert torch.allclose(modulated[:, :7], x[:, :7] * (1 + clean[:, 1:2]) + clean[:, :1], atol=1e-5)
    assert torch.allclose(modulated[:, 7:], x[:, 7:] * (1 + target[:, 1:2]) + target[:, :1], atol=1e-5)
    # one time everywhere equals one segment: the split itself adds nothing
    same = block(x, Modulation(target, target, 7), rotary)
    assert torch.allclose(same, block(x, Modulation(target, target, 0), rotary), atol=1e-5)
    assert not torch.allclose(same, block(x, Modulation(clean, target, 7), rotary), atol=1e-2)


def test_gate_scales_the_update_of_its_segment():
    x, update = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    gate = Modulation(torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 5.0), 3)
    assert gated_add(x, update, gate)[0, :, 0].tolist() == [2, 2, 2, 5]
