"""Global looks: pure functions of each pixel's colour, so they apply to synthetic clips and to footage."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError

Matrix = tuple[tuple[float, ...], ...]  # 3 x 3

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Look:
    """bend -> mix -> lift -> contrast -> clip, each on values in 0..1."""

    mix: Matrix  # rows: red, green, blue out of red, green, blue in
    lift: tuple[float, ...] = (0.0, 0.0, 0.0)
    bend: float = 0.0  # tone curve: 1 squares the values (darker), -1 is its mirror image (lighter)
    contrast: float = 1.0  # slope about one half

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Applies the look: (..., 3) in 0..1 -> (..., 3) float32 in 0..1."""
        frames = frames - np.float32(self.bend) * frames * (1 - frames) if self.bend else frames
        red, green, blue = frames[..., 0], frames[..., 1], frames[..., 2]
        out = np.empty(frames.shape, np.float32)
        for channel, (row, lift) in enumerate(zip(self.mix, self.lift)):
            r, g, b = (np.float32(v * self.contrast) for v in row)
            out[..., channel] = red * r + green * g + blue * b + np.float32((lift - 0.5) * self.contrast + 0.5)
        return np.clip(out, 0, 1, out=out)


@dataclass(frozen=True)
class PartialLook:
    """A look in another strength: 0 leaves the frames as they are, above 1 the look is exaggerated."""

    look: Look
    strength: float

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """(..., 3) in 0..1 -> (..., 3) float32 in 0..1."""
        return np.clip(frames + np.float32(self.strength) * (self.look(frames) - frames), 0, 1)


def _tinted(tint: Iterable[float], saturation: float) -> Matrix:
    """Returns the mix that keeps a fraction `saturation` of the colour and multiplies each channel by its tint."""
    return tuple(tuple(t * ((1 - saturation) * weight + saturation * (i == j)) for j, weight in enumerate(LUMA)) for i, t in enumerate(tint))


LOOKS_FN = {
    "night": Look(_tinted((0.26, 0.36, 0.72), 0.35), (0.0, 0.0, 0.04), bend=0.7),
    "sepia": Look(_tinted((1.12, 0.80, 0.48), 0.0), (0.10, 0.04, 0.0), bend=-0.35),
    "grayscale": Look(_tinted((1.0, 1.0, 1.0), 0.0), bend=-0.2, contrast=1.7),
    "warm": Look(_tinted((1.25, 0.78, 0.34), 0.75), (0.16, 0.03, 0.0)),
    "cool": Look(_tinted((0.36, 0.80, 1.20), 0.65), (0.0, 0.05, 0.22)),
    "invert": Look(_tinted((-1.0, -1.0, -1.0), 1.0), (1.0, 1.0, 1.0)),
    "contrast": Look(_tinted((1.0, 1.0, 1.0), 1.25), contrast=3.2),
    "faded": Look(_tinted((0.42, 0.42, 0.42), 0.45), (0.50, 0.48, 0.46)),
    "dark": Look(_tinted((0.42, 0.42, 0.42), 1.0), bend=0.4),
    "bright": Look(_tinted((0.80, 0.80, 0.80), 0.95), (0.36, 0.36, 0.36), bend=-0.6),
    "green": Look(_tinted((0.25, 1.10, 0.30), 0.15), (0.0, 0.08, 0.0)),
    "pink": Look(_tinted((0.85, 0.45, 0.72), 0.25), (0.25, 0.08, 0.20)),
    "swap": Look(((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))),
}


def apply_look(name: str, frames: Tensor) -> Tensor:
    """Applies a named look to footage: (..., 3) float32 in 0..1 -> the same. Raises UserError for an unknown name."""
    if name not in LOOKS_FN:
        raise UserError("unknown look", got=repr(name), expected=" or ".join(LOOKS_FN))
    return torch.from_numpy(LOOKS_FN[name](frames.numpy()))


def draw_look(rng: np.random.Generator) -> Look:
    """Draws a strong colour transform: a channel mix with a tint and a tone curve."""
    tint = rng.uniform(0.3, 1.2, 3)
    mix = np.array(_tinted(tuple(tint), rng.uniform(0, 1.1))) + rng.normal(0, 0.12, (3, 3))
    if rng.uniform() < 0.2:
        mix = mix[rng.permutation(3)]
    lift = rng.uniform(0, 1, 3) * np.maximum(0.0, 1 - mix.sum(axis=1)) * rng.uniform(0, 1)
    if rng.uniform() < 0.15:
        mix, lift = -mix, lift + np.maximum(mix, 0).sum(axis=1)
    return Look(tuple(tuple(float(v) for v in row) for row in mix), tuple(float(v) for v in lift), float(rng.uniform(-0.8, 0.8)), float(rng.uniform(0.8, 1.6)))


def jitter(rng: np.random.Generator, look: Look) -> Look:
    """Draws a relative of a look, with a somewhat different tint, tone curve and contrast."""
    mix = np.array(look.mix) * rng.uniform(0.8, 1.2, (3, 1))
    lift = np.array(look.lift) + rng.normal(0, 0.05, 3)
    return Look(
        tuple(tuple(float(v) for v in row) for row in mix),
        tuple(float(v) for v in lift),
        float(np.clip(look.bend + rng.uniform(-0.4, 0.4), -1, 1)),
        float(look.contrast * rng.uniform(0.8, 1.2)),
    )


def draw_grade(rng: np.random.Generator) -> Look:
    """Draws a mild colour transform, such as the difference between two cameras."""
    return Look(_tinted(tuple(rng.uniform(0.75, 1.1, 3)), rng.uniform(0.6, 1.3)), bend=float(rng.uniform(-0.4, 0.4)), contrast=float(rng.uniform(0.8, 1.2)))
