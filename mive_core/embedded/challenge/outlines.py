"""Outlines of the objects as polygons, and their coverage of pixels.

Local coordinates: x to the right, y down, about one unit from the centre. F frames, H x W pixels; `size` is (W, H).
"""

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 4
NUM_VERTICES = 72


def superellipse(width: float, height: float, exponent: float) -> np.ndarray:
    """Returns |x / width|^exponent + |y / height|^exponent = 1 as vertices, (N, 2). Exponent 2: an ellipse; large ones: a rectangle."""
    angle = np.linspace(0, 2 * np.pi, NUM_VERTICES, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([width * np.sign(cos) * np.abs(cos) ** (2 / exponent), height * np.sign(sin) * np.abs(sin) ** (2 / exponent)], axis=1)


def polar(radii: np.ndarray) -> np.ndarray:
    """Radii at evenly spread angles from the top, (N,) -> vertices (N, 2)."""
    angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    return np.stack([radii * np.sin(angle), -radii * np.cos(angle)], axis=1)


def blob(rng: np.random.Generator) -> np.ndarray:
    """Draws a smooth closed curve, (N, 2)."""
    angle = np.linspace(0, 2 * np.pi, NUM_VERTICES, endpoint=False)
    return polar(0.85 + sum(rng.uniform(0, 0.28) / order * np.cos(order * angle + rng.uniform(0, 2 * np.pi)) for order in (2, 3, 4)))


_ARM = [(-0.22, -0.22), (-0.34, -1.15), (0.34, -1.15)]  # of the cross; it widens towards its end
_TURNS = [np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
OUTLINES = {  # the outer polygon, and the hole's
    "circle": (superellipse(1.0, 0.9, 2.2),),
    "square": (superellipse(0.95, 0.9, 9.0),),
    "triangle": (np.array([(0.0, -1.15), (0.95, 0.8), (-0.95, 0.8)]),),
    "star": (polar(np.tile([1.25, 0.62], 5)),),
    "ring": (superellipse(1.1, 1.0, 2.0), superellipse(0.62, 0.52, 2.0)),
    "cross": (np.concatenate([np.array(_ARM) @ turn for turn in _TURNS]),),
}


def coverage(outline: tuple[np.ndarray, ...], track: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Draws an outline along a track, (F, 4) of x, y, radius and angle in pixels and radians -> (F, H, W) float32 in 0..1."""
    frames = []
    for x, y, radius, angle in track * (SUPERSAMPLING, SUPERSAMPLING, SUPERSAMPLING, 1):
        image = Image.new("L", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
        draw = ImageDraw.Draw(image)
        turn = radius * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for polygon, fill in zip(outline, (255, 0)):
            draw.polygon([tuple(vertex) for vertex in polygon @ turn + (x, y)], fill=fill)
        frames.append(np.asarray(image.reduce(SUPERSAMPLING), np.float32) / 255)
    return np.stack(frames)
