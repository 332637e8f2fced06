"""Registration of the reference to the source's first frame: image editors shift and zoom what they return by a little. (ours)

Structure, the gradient's magnitude over its local mean, survives an edit of colours; edits change some of it, so most of it decides.
"""

import numpy as np
import torch
from skimage.registration import phase_cross_correlation
from torch import Tensor
from torch.nn import functional as F

SEARCH_SIDE = 384  # longer side of the pictures that are compared, in pixels
ZOOMS = tuple(0.9 + 0.01 * step for step in range(21))
MAX_SHIFT = 0.06  # of the longer side
GAIN = 1.1  # by how much more a moved reference has to correlate than the unmoved one
FLAT = 0.01  # deviation of the structure below which a picture shows none
INNER = 0.85  # of each side: the part that is compared, since borders move out of the picture
LEAST_MOTION = 0.35  # pixels of the compared pictures, below which the reference stays as it is


def register(reference: Tensor, frame: Tensor) -> Tensor:
    """(H, W, 3) twice in 0..1 -> the reference moved over the frame by a zoom and a shift; the same tensor where it fits already."""
    fixed, moving = structure(frame), structure(reference)
    if min(fixed.std(), moving.std()) < FLAT:
        return reference
    plain = correlation(fixed, moving)
    found = max((_shifted(fixed, moving, zoom) for zoom in ZOOMS), key=lambda result: result[0])
    score, zoom, shift = found
    fine = max((_shifted(fixed, moving, zoom + step) for step in (-0.005, 0.0, 0.005)), key=lambda result: result[0])
    score, zoom, shift = max(found, fine, key=lambda result: result[0])
    corner = max(abs(shift[0]) + abs(zoom - 1) * fixed.shape[0] / 2, abs(shift[1]) + abs(zoom - 1) * fixed.shape[1] / 2)
    if score < GAIN * max(plain, 0.05) or corner < LEAST_MOTION:
        return reference
    scale = reference.shape[0] / fixed.shape[0]
    return warp(reference.movedim(-1, 0)[None], zoom, (shift[0] * scale, shift[1] * scale), "bicubic")[0].movedim(0, -1).clamp(0, 1)


def structure(image: Tensor) -> Tensor:
    """(H, W, 3) -> (h, w), the longer side at most SEARCH_SIDE: the gradient's magnitude over its local mean, at most 3."""
    x = image.movedim(-1, 0)[None].float().cpu()
    scale = min(1.0, SEARCH_SIDE / max(x.shape[2:]))
    if scale < 1:
        x = F.interpolate(x, [round(n * scale) for n in x.shape[2:]], mode="bilinear", antialias=True)
    x = F.pad(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), (1, 1, 1, 1), mode="replicate")
    gradient = ((x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]).square() + (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]).square()).sum(dim=1, keepdim=True).sqrt()
    radius = max(3, min(gradient.shape[2:]) // 12)
    return (gradient / (F.avg_pool2d(gradient, 2 * radius + 1, 1, radius, count_include_pad=False) + 0.01)).clamp(max=3)[0, 0]


def correlation(a: Tensor, b: Tensor) -> float:
    """Normalised correlation of the inner parts, (h, w) twice."""
    rows, columns = (slice(round((1 - INNER) / 2 * n), round((1 + INNER) / 2 * n)) for n in a.shape)
    a, b = a[rows, columns] - a[rows, columns].mean(), b[rows, columns] - b[rows, columns].mean()
    return float((a * b).mean() / ((a.square().mean() * b.square().mean()).sqrt() + 1e-12))


def warp(x: Tensor, zoom: float, shift: tuple[float, float], mode: str = "bilinear") -> Tensor:
    """(1, C, H, W) -> the same shape: the picture enlarged by `zoom` about its centre, then moved down and right by `shift` pixels."""
    height, width = x.shape[2:]
    rows, columns = (((torch.arange(n, device=x.device) + 0.5 - n / 2 - s) / zoom) * 2 / n for n, s in ((height, shift[0]), (width, shift[1])))
    grid = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], dim=-1)[None]
    return F.grid_sample(x, grid.to(x), mode=mode, padding_mode="border", align_corners=False)


def _shifted(fixed: Tensor, moving: Tensor, zoom: float) -> tuple[float, float, tuple[float, float]]:
    """The best shift at a zoom -> correlation, zoom, shift in pixels."""
    zoomed = warp(moving[None, None], zoom, (0.0, 0.0))[0, 0]
    window = torch.from_numpy(np.outer(*(np.hanning(n) for n in fixed.shape))).float()
    pair = ((x - x.mean()) * window for x in (fixed, zoomed))
    shift, *_ = phase_cross_correlation(*(x.numpy() for x in pair), upsample_factor=10, normalization=None)
    if max(abs(float(s)) for s in shift) > MAX_SHIFT * max(fixed.shape):
        return -1.0, zoom, (0.0, 0.0)
    moved = warp(moving[None, None], zoom, (float(shift[0]), float(shift[1])))[0, 0]
    return correlation(fixed, moved), zoom, (float(shift[0]), float(shift[1]))
