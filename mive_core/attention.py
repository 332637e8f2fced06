"""Attention as a value: the DiT is given one of these at construction and never chooses by itself.

The form is ComfyUI's, so that its own back ends fit unchanged.
B batch, L tokens, H heads, d head width.
"""

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import UserError

BACKENDS = ("auto", "sdpa", "sage", "matmul")
HOPPER_AND_BLACKWELL = (9, 10)  # compute capabilities whose cuDNN kernel is ahead of flash attention
KERNEL_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TOLERANCE = 0.1  # relative difference of a sound 8-bit kernel is a few hundredths, that of noise above one


class AttentionFn(Protocol):
    """q, k, v (B, L, H*d), heads H, mask None or broadcastable to (B, H, L, L) -> (B, L, H*d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor: ...


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn by torch's scaled_dot_product_attention, with the best kernel that takes the shapes."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with best_kernels(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def best_kernels(device: torch.device) -> AbstractContextManager:
    """cuDNN's kernel before flash attention where the card is made for it, as torch 2.11 orders them by itself and earlier ones do not.

    In what the compiler traces the order is torch's own.
    """
    own = device.type != "cuda" or torch.version.hip is not None or torch.compiler.is_compiling()
    if own or torch.cuda.get_device_capability(device)[0] not in HOPPER_AND_BLACKWELL:
        return nullcontext()
    return sdpa_kernel(KERNEL_ORDER, set_priority=True)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn as two matrix products. Holds (B, H, L, L); forward and backward in bfloat16 on a CPU in 0.4 of the kernel's time."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def sage_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn by the package sageattention: 8-bit scores, on NVIDIA cards; calls with a mask go to torch's, which it has none for."""
    from sageattention import sageattn

    if mask is not None:
        return torch_attention(q, k, v, heads, mask)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False).flatten(2)


@dataclass(frozen=True)
class CheckedAttention:
    """An AttentionFn that is held against torch's the first time it meets a head width, dtype and device, at the length it meets it.

    Where the two disagree, or it fails, a warning says so with the figures, and torch's serves instead.
    """

    function: AttentionFn
    name: str
    trusted: dict[tuple, bool] = field(default_factory=dict, compare=False)  # by head width, dtype and device

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
        key = (q.shape[-1] // heads, q.dtype, q.device)
        if key not in self.trusted:
            return self.check(key, q, k, v, heads, mask, **kwargs)
        return (self.function if self.trusted[key] else torch_attention)(q, k, v, heads, mask, **kwargs)

    def check(self, key: tuple, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **kwargs) -> Tensor:
        """Both functions on the same input, (B, L, H*d) -> (B, L, H*d) of the one that serves from now on."""
        expected = torch_attention(q, k, v, heads, mask, **kwargs)
        try:
            got = self.function(q, k, v, heads, mask, **kwargs)
            difference = relative_difference(got, expected)
            trouble = None if difference <= TOLERANCE else f"differs by {difference:.3g} of the result's size (allowed: {TOLERANCE})"
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            trouble = f"fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        self.trusted[key] = trouble is None
        if trouble is None:
            return got
        width, dtype, device = key
        warnings.warn(
            f"{self.name} attention {trouble} beside torch's at {q.shape[1]} tokens, {heads} heads of {width}, {dtype} on {device}; torch's is used instead",
            stacklevel=2,
        )
        return expected


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """(B, L, D) twice -> the root mean square of the difference over that of what was expected; infinite where a number is not finite."""
    difference = float(torch.linalg.vector_norm(got - expected, dtype=torch.float32) / torch.linalg.vector_norm(expected, dtype=torch.float32).clamp(min=1e-30))
    return difference if difference < float("inf") else float("inf")


def attention_of(name: str) -> AttentionFn:
    """A back end by name; auto is torch's own, for the others are faster at a price. Raises UserError for unknown and missing ones."""
    if name not in BACKENDS:
        raise UserError("unknown attention", where="attention", got=repr(name), expected=", ".join(BACKENDS))
    if name == "sage":
        try:
            import sageattention  # noqa: F401
        except ImportError as error:
            raise UserError(
                "sage attention needs the package sageattention",
                where="attention",
                got=str(error),
                fix="install sageattention, which needs an NVIDIA card, or take sdpa",
            ) from error
        return CheckedAttention(sage_attention, name)
    return matmul_attention if name == "matmul" else torch_attention
