"""Rotary position embedding of the sequence [condition ; reference ; target].

Scheme "wan_reference_before" (ours): target frames keep Wan's (t, y, x) from 0, the reference
frame sits at t = -1 on the same (y, x), a keyframe likewise at 1 before its own time, condition
tokens get the identity rotation.
B batch, L tokens, H heads, d head width, R references, T x Y x X patch grid.
"""

import torch
from torch import Tensor


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Head width d -> widths of its (t, y, x) parts, as in Wan."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """(..., N) positions -> (..., N, dim/2) float32 angles; the frequencies are computed in float64 on the CPU (MPS has none)."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return (positions.to(torch.float64)[..., None] * frequencies).to(torch.float32)


def token_positions(grid: tuple[int, int, int], reference_times: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The target's patch grid (T, Y, X) and the references' latent times (B, R) -> times (B, R+T), rows (Y,) and columns (X,), on the CPU."""
    num_frames, height, width = grid
    before = torch.zeros(1, 1) if reference_times is None else reference_times.cpu()
    times = torch.cat([before - 1, torch.arange(num_frames).expand(len(before), -1)], dim=1)
    return times, torch.arange(height), torch.arange(width)


def rotary_table(num_condition: int, grid: tuple[int, int, int], head_dim: int, theta: float, device=None, reference_times: Tensor | None = None) -> Tensor:
    """N_c, the target's patch grid (T, Y, X) and the references' latent times (B, R) -> (B, N_c + (R+T)*Y*X, 1, d/2) complex64 rotations.

    reference_times None: one reference, of the first frame.
    """
    positions = token_positions(grid, reference_times)
    t, y, x = (axis_angles(p, dim, theta) for p, dim in zip(positions, axis_dims(head_dim)))
    shape = (*positions[0].shape, *grid[1:], -1)
    visual = torch.cat([t[:, :, None, None].expand(shape), y[:, None].expand(shape), x.expand(shape)], dim=-1).flatten(1, 3)
    angles = torch.cat([visual.new_zeros(len(visual), num_condition, head_dim // 2), visual], dim=1)[:, :, None]
    return torch.polar(torch.ones_like(angles), angles).to(device)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """(B, L, H, d) and (B or 1, L, 1, d/2) complex -> (B, L, H, d): rotates pairs of neighbouring features as complex numbers.

    On a CPU the complex product takes a ninth of the time of real arithmetic. Without gradients it may overwrite x: at 720p x 81
    a second copy in float32 is 1.7 GB. While compiling it uses real arithmetic, since the compiler cannot generate complex code.
    """
    if torch.compiler.is_compiling():
        return apply_rotary_real(x, rotary)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    rotated = pairs * rotary if torch.is_grad_enabled() else pairs.mul_(rotary)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def apply_rotary_real(x: Tensor, rotary: Tensor) -> Tensor:
    """apply_rotary in real arithmetic, which a compiler fuses with the operations before and after."""
    (a, b), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), torch.view_as_real(rotary).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
