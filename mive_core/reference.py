"""Edited frames given to the model: the reference, which is the edited first frame, and keyframes. (ours)

Each is a clean token group of its own, one latent frame of the image alone, before the target's. B batch, C latent channels,
R edited frames, T x Y x X latent grid.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import TEMPORAL_FACTOR
from .errors import UserError

EDITED = 0.12  # squared difference of local means, over 3 x 3 cells, from which a reference shows an edit; a JPEG of quality 50 has reached 0.11


def latent_times(frames: Tensor) -> Tensor:
    """Numbers of pixel frames -> their places among latent frames, float32: frame 0 at 0, the middle of frames 4i-3 to 4i at i."""
    return torch.where(frames > 0, (frames + (TEMPORAL_FACTOR - 1) / 2) / TEMPORAL_FACTOR, 0.0).float()


def within_window(reference: Tensor, times: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """References (B, C, R, Y, X) at times (B, R) relative to a window of T latent frames -> the first one, moved to 0, and those in the window."""
    kept = (times[0] > -0.5) & (times[0] < num_frames - 0.5)
    kept[0] = True
    times = times[:, kept].clone()
    times[:, 0] = 0
    return reference[:, :, kept], times


def shows_edit(reference: Tensor, source: Tensor) -> Tensor:
    """Latents (B, C, R, Y, X) and (B, C, T, Y, X), normalised -> (B,) bool: whether the reference differs from the source's first frame."""
    difference = F.avg_pool2d((reference[:, :, 0] - source[:, :, 0]).float(), 3, 1, 1, count_include_pad=False)
    return difference.square().mean(dim=1).flatten(1).amax(dim=1) > EDITED


def fix_first_frame(velocity: Tensor, x: Tensor, t: Tensor, source: Tensor, reference: Tensor) -> Tensor:
    """The velocity (B, C, T, Y, X) at x and t (B,) that ends, in the first latent frame, at the reference where it shows an edit.

    The VAE is causal: the reference's latents are those of the edited first frame.
    """
    exact = (x[:, :, :1] - reference[:, :, :1]) / t.view(-1, 1, 1, 1, 1).clamp(min=1e-4)
    fixed = shows_edit(reference, source).view(-1, 1, 1, 1, 1)
    return torch.cat([torch.where(fixed, exact.to(velocity), velocity[:, :, :1]), velocity[:, :, 1:]], dim=2)


def check_keyframes(numbers: list[int], num_frames: int, taught: bool) -> None:
    """Raises UserError for keyframes that the checkpoint was not taught, outside of the clip, or two for one frame."""
    if numbers and not taught:
        raise UserError(
            "this checkpoint was not taught keyframes",
            where="keyframes",
            got=f"{len(numbers)} beside the reference",
            expected="none",
            fix="give the reference alone, or take a checkpoint whose config has keyframes",
        )
    for number in numbers:
        if not 0 < number < num_frames:
            raise UserError(
                "a keyframe lies outside of the clip",
                where="keyframes",
                got=f"frame {number}",
                expected=f"1 to {num_frames - 1}, counted from 0",
                fix="frame 0 is the reference",
            )
        if numbers.count(number) > 1:
            raise UserError("two keyframes for one frame", where="keyframes", got=f"frame {number}", expected="one")
