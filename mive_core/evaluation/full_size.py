"""Edits at the source's own size: the delivered edit, and two baselines that need no model.

F frames, H x W pixels of the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..anchor import fit_lut, lookup
from ..media.fit import edit_size, resize
from ..types import Clip, EditRequest, PairedEdit
from .optical_flow import optical_flow, small_gray, warp

MAX_PIXELS = 80_000  # of frame 0, from which colour_match learns


@dataclass(frozen=True)
class FullSizePairs:
    """The evaluated pairs at their sources' own sizes."""

    pairs: Sequence[PairedEdit]
    size: tuple[int, int] | None = None  # (width, height) of the edit; None: what the model knows best, in nearly the source's shape

    def fit(self, request: EditRequest, max_pixels: int) -> EditRequest:
        """A request of the source's own size -> the one that the model reads, as in `mive edit`: scaled, without cropping."""
        frames = request.source.frames
        size = self.size or edit_size((frames.shape[2], frames.shape[1]), max_pixels)
        source = Clip(torch.stack([resize(frame, size) for frame in frames]), request.source.fps)
        return EditRequest(source, resize(request.reference, size), request.instruction)


def same_request(first: EditRequest, second: EditRequest) -> bool:
    """Whether the model reads the same: source, reference and instruction are equal."""
    return first.instruction == second.instruction and torch.equal(first.source.frames, second.source.frames) and torch.equal(first.reference, second.reference)


def colour_match(source: Tensor, reference: Tensor) -> Tensor:
    """Baseline: one lookup table of colours, learned on frame 0, for all frames. (F, H, W, 3), (H, W, 3) -> (F, H, W, 3) in 0..1."""
    colours, changes = source[0].reshape(-1, 3), (reference - source[0]).reshape(-1, 3)
    drawn = torch.randperm(len(colours), generator=torch.Generator().manual_seed(0))[:MAX_PIXELS]
    lut = fit_lut(colours[drawn], changes[drawn])
    return torch.stack([(frame + lookup(lut, frame)).clamp(0, 1) for frame in source])


def flow_reference(source: Tensor, reference: Tensor) -> Tensor:
    """Baseline: what the reference changes of frame 0, moved along with the source. (F, H, W, 3), (H, W, 3) -> (F, H, W, 3) in 0..1.

    The optical flow leads from each frame to frame 0, see optical_flow.py.
    """
    gray = small_gray(source)
    change = (reference - source[0]).movedim(-1, 0)[None]
    moved = [(frame + warp(change, optical_flow(small, gray[0]))).clamp(0, 1) for frame, small in zip(source[1:], gray[1:])]
    return torch.stack([(source[0] + change[0].movedim(0, -1)).clamp(0, 1), *moved])
