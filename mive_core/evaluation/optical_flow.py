"""Optical flow between frames (TV-L1 of scikit-image), and images moved along it.

F frames, H x W pixels; h x w pixels of the small gray frames that the flow is computed on.
"""

import numpy as np
import torch
from skimage.registration import optical_flow_tvl1
from torch import Tensor
from torch.nn import functional as F

from ..media.fit import resize

FLOW_SIDE = 160  # the longer side of the gray frames
LUMA = (0.299, 0.587, 0.114)


def small_gray(frames: Tensor) -> list[np.ndarray]:
    """(F, H, W, 3) in 0..1 -> F arrays (h, w), at most FLOW_SIDE pixels a side."""
    height, width = frames.shape[1:3]
    scale = min(1.0, FLOW_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return [(resize(frame, size) @ torch.tensor(LUMA)).numpy() for frame in frames]


def optical_flow(to: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Two gray frames (h, w) -> (2, h, w): rows and columns from each pixel of `to` to where `origin` shows the same."""
    return optical_flow_tvl1(to, origin)


def warp(image: Tensor, flow: np.ndarray) -> Tensor:
    """image (1, C, H, W), flow (2, h, w): rows and columns in pixels of h x w to where each pixel comes from -> (H, W, C)."""
    size, small = image.shape[2:], flow.shape[1:]
    flow_y, flow_x = F.interpolate(torch.from_numpy(flow).float()[None], size, mode="bilinear", align_corners=False)[0]
    y, x = (((torch.arange(length) + 0.5) / length * 2 - 1) for length in size)  # -1..1 from edge to edge
    grid = torch.stack([x + flow_x * 2 / small[1], y[:, None] + flow_y * 2 / small[0]], dim=-1)
    return F.grid_sample(image, grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0].movedim(0, -1)
