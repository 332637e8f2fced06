"""Flat shapes as signed distance functions, which give antialiased masks, and the textures painted on them.

Local coordinates: x to the right, y down; a shape extends about one unit from the origin.
Whole frames are computed only with operations that IEEE 754 rounds exactly, so pixels are reproducible bit for bit.
"""

from dataclasses import dataclass

import numpy as np

REACH = 1.3  # upper bound of every shape's extent from its centre
PATTERNS = ("plain", "stripes", "dots", "gradient", "mottled")


def _circle(x, y):
    return np.sqrt(x * x + y * y) - np.float32(1.0)


def _square(x, y):
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.88)


def _triangle(x, y):
    """Equilateral, one corner up; the inscribed circle has radius 0.62 and lies a little below the origin."""
    y = y - np.float32(0.2)
    slanted = np.float32(0.8660254) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(slanted, y) - np.float32(0.62)


def _star(x, y):
    """Five points, one up. Folding twice about the mirror axis at 36 degrees leaves only half of the upper tip to evaluate."""
    tip, notch, angle = 1.25, 0.5, np.pi / 5
    normal_x, normal_y = np.float32(np.cos(angle)), np.float32(-np.sin(angle))
    x, y = np.abs(x), -y
    for _ in range(2):
        beyond = 2 * np.maximum(x * normal_x + y * normal_y, 0)
        x, y = np.abs(x - beyond * normal_x), y - beyond * normal_y
    edge_x, edge_y = notch * np.sin(angle), notch * np.cos(angle) - tip
    length = np.hypot(edge_x, edge_y)
    return x * np.float32(-edge_y / length) + (y - np.float32(tip)) * np.float32(edge_x / length)


def _ring(x, y):
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.78)) - np.float32(0.27)


def _cross(x, y):
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - np.float32(1.05), np.minimum(x, y) - np.float32(0.33))


DISTANCES = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring, "cross": _cross}
ROUND = ("circle", "ring")  # rotationally symmetric


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns the covered fraction of each pixel: local x, y (F, h, w) and radius in pixels (F, 1, 1) -> (F, h, w) in 0..1."""
    return np.clip(np.float32(0.5) - DISTANCES[shape](x, y) * radius, 0, 1)


def triangle_wave(x: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1, from -1 at 0 to 1 at 1/2."""
    return 1 - 4 * np.abs(x - np.floor(x) - np.float32(0.5))


@dataclass(frozen=True)
class Texture:
    """A pattern in -1..1 that lightens and darkens a colour; it moves with the shape it is painted on."""

    pattern: str
    direction: tuple[float, float]  # periods per unit along local x and y
    shift: float
    depth: float  # strength, 0..1

    def shade(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Evaluates the pattern: local x, y (F, h, w) -> (F, h, w) in -depth..depth."""
        a, b = (np.float32(v) for v in self.direction)
        along, across = x * a + y * b + np.float32(self.shift), x * b - y * a
        if self.pattern == "plain":
            return np.zeros_like(x)
        if self.pattern == "gradient":
            value = np.clip((along - np.float32(self.shift)) * np.float32(0.8), -1, 1)
        elif self.pattern == "stripes":
            value = np.clip(triangle_wave(along) * 3, -1, 1)
        elif self.pattern == "dots":
            value = np.clip((triangle_wave(along) + triangle_wave(across)) * 2 - np.float32(0.8), -1, 1)
        else:
            value = np.float32(0.55) * (
                triangle_wave(along * np.float32(0.7)) + triangle_wave(across * np.float32(1.3)) * triangle_wave((along + across) * np.float32(0.9))
            )
        return value * np.float32(self.depth)

    def paint(self, colour: tuple[float, float, float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Applies the texture to a colour: local x, y (F, h, w) -> (F, h, w, 3) in 0..1."""
        shade = self.shade(x, y)[..., None]
        base = np.array(colour, np.float32)
        return base * (1 - np.abs(shade)) + np.maximum(shade, 0)


def draw_texture(rng: np.random.Generator, period: float = 1.0) -> Texture:
    """Draws a subtle texture with stripes or dots about `period` units apart."""
    angle, rate = rng.uniform(0, np.pi), rng.uniform(0.8, 1.3) / period
    return Texture(str(rng.choice(PATTERNS)), (float(rate * np.cos(angle)), float(rate * np.sin(angle))), float(rng.uniform()), float(rng.uniform(0.08, 0.2)))
