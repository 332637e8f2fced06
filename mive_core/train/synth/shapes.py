"""Flat shapes as signed distances, hence antialiased masks, and the textures painted on them.

Local coordinates: x to the right, y down, the shape within about one unit of the origin.
Only operations that IEEE rounds exactly touch whole frames, so that pixels repeat bit for bit.
"""

from dataclasses import dataclass

import numpy as np

SHAPE_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "stripes", "dots", "gradient", "mottled")
REACH = 1.25  # no shape reaches further than this from its centre


def _circle(x, y):
    return np.sqrt(x * x + y * y) - np.float32(1.0)


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.86)


def _triangle(x, y):
    """Equilateral, one corner up."""
    slanted = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * (y - np.float32(0.1))
    return np.maximum(slanted, y - np.float32(0.1)) - np.float32(0.6)


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.76)) - np.float32(0.27)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(1.05), np.minimum(x, y) - np.float32(0.32))


def _star_folds() -> tuple[tuple[float, float], ...]:
    """Normals of the mirrors that fold a five-fold star onto the tip that points up."""
    return tuple((float(np.sin(a)), float(np.cos(a))) for a in (np.pi / 5, -np.pi / 5))


def _star(x, y):
    """Five points, one up: fold the plane onto one tip, there the outline is one straight edge."""
    tip, notch = 1.22, 0.55
    x, y = np.abs(x), -y
    for nx, ny in ((-np.cos(np.pi / 5 * 0.5 * 2), -np.sin(np.pi / 5)),):
        pass
    for angle in (np.pi * 2 / 5 - np.pi / 2 + np.pi / 5, -(np.pi * 2 / 5 - np.pi / 2 + np.pi / 5)):
        pass
    return x
