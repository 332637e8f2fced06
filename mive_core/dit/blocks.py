"""One block of the unified backbone: self-attention and feed-forward, each modulated by segment.

Keys are Wan's, so that its weights and LoRAs fit. The sequence is [clean ; target]: clean tokens
(condition and reference) are modulated at t = 0, target tokens at the current t. Two vectors per
block serve for that; a (B, L, 6, D) tensor would be 5 GB at 720p x 81.
B batch, L tokens, D model width, H heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import AttentionFn
from .rope import rotate

PIECE = 16_384  # tokens that go through a feed-forward together: its inner width is up to six times D


@dataclass(frozen=True)
class Modulation:
    """What the two timesteps do to the two segments of a sequence."""

    clean: Tensor  # (1, n, D) from t = 0
    target: Tensor  # (B, n, D) from the current t
    num_clean: int  # N_c + N_ref

    def offset(self, learned: Tensor) -> "Modulation":
        """Adds a block's own (1, n, D) parameter, cast here because it may be stored in another dtype."""
        learned = learned.to(self.target)
        return Modulation(self.clean + learned, self.target + learned, self.num_clean)

    def row(self, i: int) -> "Modulation":
        return Modulation(self.clean[:, i : i + 1], self.target[:, i : i + 1], self.num_clean)


def bare_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of a bare parameter in a model of `dtype`: 8 bits are for what `operations` casts at use."""
    return torch.float32 if dtype is not None and dtype.itemsize == 1 else dtype


def modulate(x: Tensor, shift: Modulation, scale: Modulation) -> Tensor:
    """(B, L, D) -> x * (1 + scale) + shift, each segment with its own. May overwrite x."""
    n = shift.num_clean
    return _by_segment((shift.clean, x[:, :n], 1 + scale.clean), (shift.target, x[:, n:], 1 + scale.target), x)


def gated_add(x: Tensor, update: Tensor, gate: Modulation) -> Tensor:
    """(B, L, D) -> x + update * gate, each segment with its own. May overwrite update."""
    n = gate.num_clean
    return _by_segment((x[:, :n], update[:, :n], gate.clean), (x[:, n:], update[:, n:], gate.target), update)


def _by_segment(clean: tuple[Tensor, ...], target: tuple[Tensor, ...], whole: Tensor) -> Tensor:
    """base + value * factor of both segments; into `whole`, which the values are parts of, where no gradient is recorded.

    A compiler is left to find the place by itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat([torch.addcmul(*clean), torch.addcmul(*target)], dim=1)
    for base, value, factor in (clean, target):
        torch.addcmul(base, value, factor, out=value)
    return whole


class SelfAttention(nn.Module):
    """Wan's self-attention: RMS-normalised queries and keys over the whole width, rotary positions."""

    def __init__(self, width: int, num_heads: int, eps: float, *, operations, attention: AttentionFn, device=None, dtype=None):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        made = {"device": device, "dtype": dtype}
        self.q = operations.Linear(width, width, **made)
        self.k = operations.Linear(width, width, **made)
        self.v = operations.Linear(width, width, **made)
        self.o = operations.Linear(width, width, **made)
        self.norm_q = operations.RMSNorm(width, eps=eps, **made)
        self.norm_k = operations.RMSNorm(width, eps=eps, **made)

    def forward(self, x: Tensor, rotary: Tensor, **attention_options) -> Tensor:
        """(B, L, D), rotary (1, L, 1, d/2) -> (B, L, D)."""
        q = rotate(self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1)), rotary).flatten(2)
        k = rotate(self.norm_k(self.k(x)).unflatten(-1, (self.num_heads, -1)), rotary).flatten(2)
        return self.o(self.attention(q, k, self.v(x), self.num_heads, **attention_options))


class Block(nn.Module):
    """Wan2.1's block without its cross-attention."""

    def __init__(self, width: int, num_heads: int, ffn_width: int, eps: float, *, operations, attention: AttentionFn, device=None, dtype=None):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.norm1 = operations.LayerNorm(width, eps=eps, elementwise_affine=False, **made)
        self.self_attn = SelfAttention(width, num_heads, eps, operations=operations, attention=attention, **made)
        self.norm2 = operations.LayerNorm(width, eps=eps, elementwise_affine=False, **made)
        self.ffn = nn.Sequential(operations.Linear(width, ffn_width, **made), nn.GELU(approximate="tanh"), operations.Linear(ffn_width, width, **made))
        self.modulation = nn.Parameter(torch.randn(1, 6, width, device=device, dtype=bare_dtype(dtype)) / width**0.5)

    def forward(self, x: Tensor, time: Modulation, rotary: Tensor, **attention_options) -> Tensor:
        """(B, L, D), time of 6 rows, rotary (1, L, 1, d/2) -> (B, L, D)."""
        m = time.offset(self.modulation)
        attended = self.self_attn(modulate(self.norm1(x), m.row(0), m.row(1)), rotary, **attention_options)
        x = gated_add(x, attended, m.row(2))
        return gated_add(x, self.feed_forward(modulate(self.norm2(x), m.row(3), m.row(4))), m.row(5))

    def feed_forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D). Without a gradient a long sequence goes through in pieces, each back into its place in x."""
        if torch.is_grad_enabled() or x.shape[1] <= PIECE:
            return self.ffn(x)
        for piece in x.split(PIECE, dim=1):
            piece.copy_(self.ffn(piece))
        return x
