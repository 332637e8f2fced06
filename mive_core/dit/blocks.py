"""One block of the DiT: self-attention and feed-forward, each modulated per segment.

Keys are Wan's, so that its weights and LoRAs fit. The sequence is [clean ; target]: clean tokens
(condition and reference) are modulated at t = 0, target tokens at the current t. One
modulation per segment suffices; a (B, L, 6, D) tensor would be 5 GB at 720p x 81.
B batch, L tokens, D model width, H heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import AttentionFn
from .rope import apply_rotary

FFN_CHUNK = 16_384  # tokens per chunk of the feed-forward, whose inner width is up to six times D


@dataclass(frozen=True)
class Modulation:
    """Modulation vectors of the two segments of a sequence, each from its own timestep."""

    clean: Tensor  # (1, n, D) from t = 0
    target: Tensor  # (B, n, D) from the current t
    num_clean: int  # N_c + N_ref

    def offset(self, learned: Tensor) -> "Modulation":
        """Adds a block's learned (1, n, D) parameter, which may be stored in another dtype."""
        learned = learned.to(self.target)
        return Modulation(self.clean + learned, self.target + learned, self.num_clean)

    def row(self, i: int) -> "Modulation":
        return Modulation(self.clean[:, i : i + 1], self.target[:, i : i + 1], self.num_clean)


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of bare parameters in a model of `dtype`: float32 for 8 bits, since only the layers of `operations` cast weights at use."""
    return torch.float32 if dtype is not None and dtype.itemsize == 1 else dtype


def modulate(x: Tensor, shift: Modulation, scale: Modulation) -> Tensor:
    """(B, L, D) -> x * (1 + scale) + shift, per segment. May overwrite x."""
    n = shift.num_clean
    return _addcmul_segments((shift.clean, x[:, :n], 1 + scale.clean), (shift.target, x[:, n:], 1 + scale.target), x)


def gated_add(x: Tensor, update: Tensor, gate: Modulation) -> Tensor:
    """(B, L, D) -> x + update * gate, per segment. May overwrite update."""
    n = gate.num_clean
    return _addcmul_segments((x[:, :n], update[:, :n], gate.clean), (x[:, n:], update[:, n:], gate.target), update)


def _addcmul_segments(clean: tuple[Tensor, ...], target: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """base + value * factor of both segments, given as (base, value, factor).

    Without gradients the result overwrites `out`, of which the values are views. A compiler plans memory by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([torch.addcmul(*clean), torch.addcmul(*target)], dim=1)
    for base, value, factor in (clean, target):
        torch.addcmul(base, value, factor, out=value)
    return out


class SelfAttention(nn.Module):
    """Wan's self-attention: queries and keys RMS-normalised over the whole width, rotary positions."""

    def __init__(self, width: int, num_heads: int, eps: float, *, operations, attention: AttentionFn, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        factory_kwargs = {"device": device, "dtype": dtype}
        self.q = operations.Linear(width, width, **factory_kwargs)
        self.k = operations.Linear(width, width, **factory_kwargs)
        self.v = operations.Linear(width, width, **factory_kwargs)
        self.o = operations.Linear(width, width, **factory_kwargs)
        self.norm_q = operations.RMSNorm(width, eps=eps, **factory_kwargs)
        self.norm_k = operations.RMSNorm(width, eps=eps, **factory_kwargs)

    def forward(self, x: Tensor, rotary: Tensor, **attention_options) -> Tensor:
        """(B, L, D), rotary (B or 1, L, 1, d/2) -> (B, L, D)."""
        q = apply_rotary(self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1)), rotary).flatten(2)
        k = apply_rotary(self.norm_k(self.k(x)).unflatten(-1, (self.num_heads, -1)), rotary).flatten(2)
        return self.o(self.attention(q, k, self.v(x), self.num_heads, **attention_options))


class Block(nn.Module):
    """Wan2.1's block without its cross-attention."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, eps: float, *, operations, attention: AttentionFn, device=None, dtype=None):
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.norm1 = operations.LayerNorm(width, eps=eps, elementwise_affine=False, **factory_kwargs)
        self.self_attn = SelfAttention(width, num_heads, eps, operations=operations, attention=attention, **factory_kwargs)
        self.norm2 = operations.LayerNorm(width, eps=eps, elementwise_affine=False, **factory_kwargs)
        self.ffn = nn.Sequential(
            operations.Linear(width, ffn_width, **factory_kwargs), nn.GELU(approximate="tanh"), operations.Linear(ffn_width, width, **factory_kwargs)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, width, device=device, dtype=parameter_dtype(dtype)) / width**0.5)

    def forward(self, x: Tensor, time: Modulation, rotary: Tensor, **attention_options) -> Tensor:
        """(B, L, D), time of 6 rows, rotary (B or 1, L, 1, d/2) -> (B, L, D)."""
        m = time.offset(self.modulation)
        attended = self.self_attn(modulate(self.norm1(x), m.row(0), m.row(1)), rotary, **attention_options)
        x = gated_add(x, attended, m.row(2))
        return gated_add(x, self.feed_forward(modulate(self.norm2(x), m.row(3), m.row(4))), m.row(5))

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D). Without gradients a long sequence is processed in chunks, each written back into x."""
        if torch.is_grad_enabled() or x.shape[1] <= FFN_CHUNK:
            return self.ffn(x)
        for chunk in x.split(FFN_CHUNK, dim=1):
            chunk.copy_(self.ffn(chunk))
        return x
