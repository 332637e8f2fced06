"""Clips of moving natural pictures, with the real edges, grain and hues that synthetic shapes lack."""

import numpy as np
import torch
from torch.nn import functional as F

from .synthetic.background import draw_camera
from .synthetic.looks import draw_look
from .synthetic.natural_images import PICTURES, film


def natural_clip(seed: int, size: tuple[int, int] = (96, 96), num_frames: int = 17) -> np.ndarray:
    """Draws a clip that pans, zooms and rotates over a picture, often with pieces of others moving across: (F, H, W, 3) float32 in 0..1."""
    rng = np.random.default_rng([seed, 0x7E87])
    times = np.arange(num_frames, dtype=np.float64) / max(num_frames - 1, 1) * rng.choice([0.3, 1.0, 2.0])
    frames = _view(rng, times, size)
    for _ in range(rng.choice(3, p=[0.4, 0.4, 0.2])):
        cover = _moving_mask(rng, times, size)
        frames += cover[..., None] * (_view(rng, times, size) - frames)
    return np.clip(frames, 0, 1).astype(np.float32)


def _view(rng: np.random.Generator, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draws a clip of one picture: (F, H, W, 3) in 0..1."""
    rotated = rng.uniform() < 0.4
    margin = 1.45 if rotated else 1.0  # room for a rotation by 45 degrees
    view_size = (int(size[0] * margin), int(size[1] * margin))
    frames = film(str(rng.choice(PICTURES)), draw_camera(rng, (0.2, 0.95)), times, view_size, bool(rng.integers(2)))
    if rotated:
        frames = _rotate(frames, rng.uniform(-0.8, 0.8) + rng.uniform(-0.6, 0.6) * times, size)
    if rng.uniform() < 0.5:
        frames = draw_look(rng)(frames)
    return frames


def _rotate(frames: np.ndarray, angles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Rotates each frame about its centre: (F, h, w, 3), angles (F,) -> (F, H, W, 3)."""
    width, height = size
    x, y = (np.arange(width) - (width - 1) / 2)[None, None, :], (np.arange(height) - (height - 1) / 2)[None, :, None]
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    grid = np.stack([(x * cos - y * sin) * 2 / frames.shape[2], (x * sin + y * cos) * 2 / frames.shape[1]], axis=-1)
    turned = F.grid_sample(
        torch.from_numpy(frames).permute(0, 3, 1, 2), torch.from_numpy(grid).float(), mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return turned.permute(0, 2, 3, 1).numpy()


def _moving_mask(rng: np.random.Generator, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draws the antialiased mask of an ellipse or box in straight motion: (F, H, W) in 0..1."""
    width, height = size
    centre, speed = rng.uniform(0.1, 0.9, 2), rng.normal(0, 0.35, 2)
    radius = rng.uniform(0.08, 0.4, 2) * min(size)
    x = np.arange(width)[None, None, :] - (centre[0] + speed[0] * times)[:, None, None] * width
    y = np.arange(height)[None, :, None] - (centre[1] + speed[1] * times)[:, None, None] * height
    angle = rng.uniform(0, np.pi)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) / radius[0], (y * np.cos(angle) - x * np.sin(angle)) / radius[1]
    distance = np.sqrt(u * u + v * v) if rng.uniform() < 0.5 else np.maximum(np.abs(u), np.abs(v))
    return np.clip((1 - distance) * radius.min() + 0.5, 0, 1).astype(np.float32)
