"""From hidden states to condition tokens."""

import torch
from torch import nn

from mive_core.dit.context import ContextProjection


def test_the_norm_is_in_float32_whatever_the_models_dtype():
    """A deliberate fault once passed every test: the norm computed in the model's dtype. Qwen3-VL has channels a thousand times the rest,
    and bfloat16 states would be rounded before they are normalised. With identities for matrices what comes out is the norm, rounded once."""
    torch.manual_seed(0)
    projection = ContextProjection(64, 128, 2, 1e-6, operations=nn, dtype=torch.bfloat16)
    with torch.no_grad():
        for linear, size in ((projection.projections[0], 64), (projection.projections[1], 64), (projection.fuse, 128)):
            linear.weight.copy_(torch.eye(size))
            linear.bias.zero_()
    states = torch.randn(2, 2, 40, 64)
    states[..., 5] *= 1000
    normalised = states / (states.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt().float()
    expected = torch.cat([normalised[:, 0], normalised[:, 1]], dim=-1).to(torch.bfloat16)
    tokens = projection(states, torch.bfloat16)
    assert tokens.dtype == torch.bfloat16
    assert (tokens == expected).float().mean() > 0.999  # a tie may be rounded either way
