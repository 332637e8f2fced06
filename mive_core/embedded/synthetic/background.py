"""Backgrounds behind the shapes: flat colours, gradients, patterns and filmed pictures."""

from dataclasses import dataclass

import numpy as np

from .looks import Look
from .natural_images import Camera, film, is_gray, tones_of
from .shapes import triangle_wave

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Backdrop:
    """One background. `style` is flat, gradient, stripes, checkers or the name of a picture."""

    style: str
    first: Colour  # the only colour of a flat background; the dark end of a gray picture
    second: Colour
    direction: tuple[float, float] = (0.0, 1.0)  # of gradients and stripes, unit length
    slide: float = 0.0  # speed: periods (gradients: half-heights) per time unit
    period: float = 0.25  # period of stripes and checkers, in frame heights
    camera: Camera | None = None
    flip: bool = False
    grade: Look | None = None  # colour grade, pictures only

    def render(self, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Renders the background: times (F,) -> (F, H, W, 3) float32 in 0..1."""
        first, second = np.array(self.first, np.float32), np.array(self.second, np.float32)
        if self.camera is not None:
            frames = film(self.style, self.camera, times, size, self.flip)
            frames = first + frames * (second - first) if is_gray(self.style) else frames
            return self.grade(frames) if self.grade else frames
        width, height = size
        if self.style == "flat":
            return np.broadcast_to(first, (len(times), height, width, 3)).copy()
        return first + self._weight(times, width, height)[..., None] * (second - first)

    def _weight(self, times: np.ndarray, width: int, height: int) -> np.ndarray:
        """Returns the blend weight of the second colour, (F, H, W) in 0..1."""
        x = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, None, :]
        y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[None, :, None]
        dx, dy = (np.float32(v) for v in self.direction)
        moved = (times * self.slide).astype(np.float32)[:, None, None]
        if self.style == "gradient":
            return np.clip((x * dx + y * dy) / (abs(dx) + abs(dy)) + moved * np.float32(0.5) + np.float32(0.5), 0, 1)
        x, rate, sharp = x * np.float32(width / height), np.float32(1 / self.period), np.float32(height * self.period / 4)
        along = np.clip(triangle_wave((x * dx + y * dy) * rate + moved) * sharp, -1, 1)
        if self.style == "checkers":
            along = along * np.clip(triangle_wave((x * dy - y * dx) * rate) * sharp, -1, 1)
        return np.float32(0.5) + np.float32(0.5) * along

    def tones(self) -> list[np.ndarray]:
        """Returns the dominant colours, each (3,), for choosing object colours that stand out."""
        first, second = np.array(self.first), np.array(self.second)
        if self.camera is None:
            return [first] if self.style == "flat" else [first, (first + second) / 2, second]
        tones = tones_of(self.style)
        tones = first + tones * (second - first) if is_gray(self.style) else tones
        return list(self.grade(tones) if self.grade else tones)


@dataclass(frozen=True)
class Footage:
    """A real video as the background, frame by frame."""

    frames: np.ndarray  # (F, H, W, 3) float32 in 0..1, of the size and at least the length of the drawn clip

    def render(self, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Returns as many frames as there are times, (F, H, W, 3). Raises ValueError if the footage is too short or of another size."""
        frames = self.frames[: len(times)]
        if frames.shape[:3] != (len(times), *size[::-1]):
            raise ValueError(f"footage of shape {self.frames.shape} for {len(times)} frames of {size[0]}x{size[1]}")
        return frames


def draw_camera(rng: np.random.Generator, covers: tuple[float, float] = (0.18, 0.6)) -> Camera:
    """Draws a slow pan and zoom; `covers` is the range of the view's size, as a fraction of the largest that fits."""
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.35)
    return Camera(
        (float(rng.uniform()), float(rng.uniform())),
        (float(speed * np.cos(angle)), float(speed * np.sin(angle))),
        float(rng.uniform(*covers)),
        float(rng.uniform(-0.15, 0.15)),
    )
