"""Colour looks in any strength from 0 (the source) to 1. Pixels (..., 3) float32 in 0..1."""

from collections.abc import Callable

import numpy as np

GRAY = np.full(3, 1 / 3)


def _split_tone(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Shadows turn blue, highlights turn yellow."""
    light = pixels.mean(axis=-1, keepdims=True)
    return pixels + strength * ((1 - light) ** 2 * np.array([-0.1, 0.12, 0.55]) + light**2 * np.array([0.2, 0.04, -0.6]))


def _gamma(pixels: np.ndarray, exponent: float) -> np.ndarray:
    return np.clip(pixels, 0, 1) ** np.exp(exponent)


def _temperature(pixels: np.ndarray, shift: float) -> np.ndarray:
    """Scales red and blue of linear light against each other."""
    return (np.clip(pixels, 0, 1) ** 2.2 * np.exp(shift * np.array([1.0, 0.1, -1.0]))) ** (1 / 2.2)


def _matte(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Lifts the shadows, lowers the highlights and takes three fifths of the saturation."""
    light = pixels.mean(axis=-1, keepdims=True)
    return 0.28 * strength + (1 - 0.45 * strength) * (pixels + 0.6 * strength * (light - pixels)) + strength * np.array([0.05, 0.02, -0.04])


def _turned_hues(pixels: np.ndarray, strength: float) -> np.ndarray:
    """Rotates colours about the gray axis by up to 120 degrees."""
    angle = 2 * np.pi / 3 * strength
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return pixels @ (np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(np.ones(3), GRAY)).T


LOOKS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "split tone": _split_tone,
    "matte": _matte,
    "warmer": lambda pixels, strength: _temperature(pixels, 0.9 * strength),
    "cooler": lambda pixels, strength: _temperature(pixels, -0.9 * strength),
    "lighter": lambda pixels, strength: _gamma(pixels, -0.9 * strength),
    "darker": lambda pixels, strength: _gamma(pixels, 0.9 * strength),
    "turned hues": _turned_hues,
}
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def apply_look(look: str, strength: float, pixels: np.ndarray) -> np.ndarray:
    """Applies one of LOOKS -> (..., 3) float32 in 0..1."""
    return np.clip(LOOKS[look](pixels, strength), 0, 1).astype(np.float32)
