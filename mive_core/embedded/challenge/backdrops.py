"""Backgrounds of filtered noise under a moving camera, and parts of footage. F frames, H x W pixels; `size` is (W, H)."""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

PAD = 1.6  # side of the noise image, relative to the frame's longer side
GRAINS = (0.02, 0.05, 0.1, 0.2)  # blur radii, relative to the same
MAX_PAN = 0.25  # of the frame's longer side over the clip
MAX_ZOOM = 0.15


def draw_backdrop(rng: np.random.Generator, size: tuple[int, int], num_frames: int, footage: np.ndarray | None = None) -> np.ndarray:
    """Draws a background: part of the footage, (N, H, W, 3) in 0..1, N at least num_frames, or noise -> (F, H, W, 3) float32 in 0..1."""
    if footage is not None:
        start = int(rng.integers(len(footage) - num_frames + 1))
        return footage[start : start + num_frames]
    low = rng.uniform(0.05, 0.6, 3)
    return draw_noise(rng, size, num_frames, low, low + rng.uniform(-0.1, 0.4, 3))


def draw_noise(rng: np.random.Generator, size: tuple[int, int], num_frames: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Draws noise between two colours, with a camera that pans and zooms -> (F, H, W, 3) float32 in 0..1."""
    longer = max(size)
    side = round(PAD * longer)
    weights = rng.dirichlet(np.ones(len(GRAINS)))
    layers = [gaussian_filter(rng.normal(size=(side, side)), grain * longer * rng.uniform(0.5, 1.5, 2), mode="wrap") for grain in GRAINS]
    values = sum(weight * layer / layer.std() for weight, layer in zip(weights, layers))
    values = 1 / (1 + np.exp(-rng.uniform(1.0, 3.0) * values / values.std()))
    heading, distance, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0, MAX_PAN) * longer, rng.uniform(-MAX_ZOOM, MAX_ZOOM)
    rows, columns = np.mgrid[: size[1], : size[0]] - np.array([size[1] - 1, size[0] - 1]).reshape(2, 1, 1) / 2
    frames = []
    for share in np.linspace(-0.5, 0.5, num_frames):
        scale = 1 + zoom * share
        y, x = (scale * grid + side / 2 + share * distance * pan for grid, pan in ((rows, np.sin(heading)), (columns, np.cos(heading))))
        frames.append(map_coordinates(values, [y, x], order=1, mode="grid-wrap"))
    return np.clip(low + np.stack(frames)[..., None] * (high - low), 0, 1).astype(np.float32)
