"""Attention functions. The DiT gets one of them at construction and never chooses by itself.

The signature is ComfyUI's, so that its own back ends fit unchanged.
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
HOPPER_AND_BLACKWELL = (9, 10)  # compute capabilities on which cuDNN's kernel is faster than flash attention
KERNEL_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TOLERANCE = 0.1  # relative difference; a correct 8-bit kernel differs by a few hundredths, noise by more than one


class AttentionFn(Protocol):
    """q, k, v (B, L, H*d), heads H, mask None or broadcastable to (B, H, L, L) -> (B, L, H*d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor: ...


def torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn by torch's scaled_dot_product_attention, with the best kernel that takes the shapes."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with best_kernels(q.device):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def best_kernels(device: torch.device) -> AbstractContextManager:
    """A context that prefers cuDNN's kernel to flash attention on Hopper and Blackwell. torch 2.11 uses this order by default, earlier versions do not.

    While compiling, torch's own order is kept.
    """
    keep_order = device.type != "cuda" or torch.version.hip is not None or torch.compiler.is_compiling()
    if keep_order or torch.cuda.get_device_capability(device)[0] not in HOPPER_AND_BLACKWELL:
        return nullcontext()
    return sdpa_kernel(KERNEL_ORDER, set_priority=True)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn as two matrix products. Holds (B, H, L, L); forward and backward in bfloat16 on a CPU take 0.4 of the time of torch's kernel."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def sage_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
    """AttentionFn by the package sageattention: 8-bit scores, NVIDIA cards only. It supports no mask, so calls with a mask go to torch."""
    from sageattention import sageattn

    if mask is not None:
        return torch_attention(q, k, v, heads, mask)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False).flatten(2)


@dataclass(frozen=True)
class CheckedAttention:
    """An AttentionFn that is compared with torch's on its first call for each head width, dtype and device, at the length of that call.

    If the two disagree, or the function fails, it warns with the figures and uses torch's instead.
    """

    function: AttentionFn
    name: str
    trusted: dict[tuple, bool] = field(default_factory=dict, compare=False)  # (head width, dtype, device) -> whether the function agreed with torch's

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
        key = (q.shape[-1] // heads, q.dtype, q.device)
        if key not in self.trusted:
            return self.check(key, q, k, v, heads, mask, **kwargs)
        return (self.function if self.trusted[key] else torch_attention)(q, k, v, heads, mask, **kwargs)

    def check(self, key: tuple, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, **kwargs) -> Tensor:
        """Runs both functions on the same input, (B, L, H*d) -> (B, L, H*d) of the one that is used from now on."""
        expected = torch_attention(q, k, v, heads, mask, **kwargs)
        try:
            got = self.function(q, k, v, heads, mask, **kwargs)
            difference = relative_difference(got, expected)
            problem = None if difference <= TOLERANCE else f"differs by {difference:.3g} of the result's size (allowed: {TOLERANCE})"
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            problem = f"fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        self.trusted[key] = problem is None
        if problem is None:
            return got
        width, dtype, device = key
        warnings.warn(
            f"{self.name} attention {problem} beside torch's at {q.shape[1]} tokens, {heads} heads of {width}, {dtype} on {device}; torch's is used instead",
            stacklevel=2,
        )
        return expected


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """Root mean square of got - expected, both (B, L, D), over that of expected; infinity if a value is not finite."""
    difference = float(torch.linalg.vector_norm(got - expected, dtype=torch.float32) / torch.linalg.vector_norm(expected, dtype=torch.float32).clamp(min=1e-30))
    return difference if difference < float("inf") else float("inf")


def get_attention(name: str) -> AttentionFn:
    """Returns a back end by name; auto is torch's own, since the others are faster only at a price. Raises UserError for unknown or missing ones."""
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
