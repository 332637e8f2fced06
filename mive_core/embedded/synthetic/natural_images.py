"""Natural images from the scikit-image wheel, filmed by a slowly moving camera.

Nothing is downloaded: the files are read from the installed package.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from skimage.io import imread

FILES = {
    "cup": "coffee.png",
    "portrait": "astronaut.png",
    "cat": "chelsea.png",
    "rocket": "rocket.jpg",
    "stars": "hubble_deep_field.jpg",
    "garage": "motorcycle_left.png",
    "tissue": "ihc.png",
    "eye": "retina.jpg",
    "tripod": "camera.png",
    "coins": "coins.png",
    "moon": "moon.png",
    "paper": "page.png",
    "gravel": "gravel.png",
    "bricks": "brick.png",
    "grass": "grass.png",
}
PICTURES = tuple(FILES)


@cache
def pyramid(name: str) -> tuple[np.ndarray, ...]:
    """Returns the picture and its successive halvings, each (h, w, 3) uint8, down to about 64 pixels."""
    image = imread(Path(skimage.__file__).parent / "data" / FILES[name])
    image = np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image[:, :, :3]
    levels = [np.ascontiguousarray(image)]
    while min(levels[-1].shape[:2]) >= 128:
        h, w = (n // 2 * 2 for n in levels[-1].shape[:2])
        quads = levels[-1][:h, :w].astype(np.uint16).reshape(h // 2, 2, w // 2, 2, 3)
        levels.append(((quads.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8))
    return tuple(levels)


@cache
def is_gray(name: str) -> bool:
    """Whether the picture has no colour."""
    smallest = pyramid(name)[-1]
    return bool((smallest == smallest[:, :, :1]).all())


@cache
def tones_of(name: str) -> np.ndarray:
    """Returns the mean colours of the picture's dark, middle and light thirds, (3, 3) in 0..1."""
    pixels = pyramid(name)[-1].reshape(-1, 3) / 255
    thirds = np.array_split(pixels[np.argsort(pixels.sum(axis=1), kind="stable")], 3)
    return np.stack([third.mean(axis=0) for third in thirds])


@dataclass(frozen=True)
class Camera:
    """A straight pan with a steady zoom over a picture, in fractions of the largest possible ones."""

    start: tuple[float, float]  # 0..1 between the leftmost and rightmost, topmost and lowest view
    drift: tuple[float, float]  # view sizes per time unit, along x and y
    cover: float  # the view's size at time 0, as a fraction of the largest that fits
    zoom: float  # relative change of the view's size per time unit

    def views(self, times: np.ndarray, size: tuple[int, int], picture: tuple[int, int]) -> np.ndarray:
        """Returns the view at times (F,): (F, 3) of centre x, centre y and picture pixels per frame pixel."""
        (width, height), (pw, ph) = size, picture
        largest = min((pw - 2) / width, (ph - 2) / height)
        scale = np.clip(self.cover * (1 + self.zoom * times), 0.12, 1.0) * largest
        centres = []
        for start, drift, n, m in ((self.start[0], self.drift[0], width, pw), (self.start[1], self.drift[1], height, ph)):
            room = m - 1 - n * scale  # >= 0: the distance that the view can travel
            travelled = start * room[0] + drift * times * n * scale[0]
            folded = room - np.abs((travelled % np.maximum(2 * room, 1e-6)) - room)  # reverses at the picture's edge
            centres.append(folded + n * scale / 2)
        return np.stack([*centres, scale], axis=1)


def film(name: str, camera: Camera, times: np.ndarray, size: tuple[int, int], flip: bool = False) -> np.ndarray:
    """Samples the picture bilinearly through the camera: times (F,) -> (F, H, W, 3) float32 in 0..1."""
    levels = pyramid(name)
    views = camera.views(times, size, levels[0].shape[1::-1])
    depth = int(np.clip(np.floor(np.log2(max(views[:, 2].mean(), 1.0)) + 0.35), 0, len(levels) - 1))
    image = levels[depth][:, ::-1] if flip else levels[depth]
    views = views / 2**depth
    width, height = size
    frames = np.empty((len(times), height, width, 3), np.float32)
    for frame, (x, y, scale) in zip(frames, views):
        x0, fx = _taps(x, scale, width, image.shape[1])
        y0, fy = _taps(y, scale, height, image.shape[0])
        left = x0[0]
        window = image[y0[0] : y0[-1] + 2, left : x0[-1] + 2].astype(np.float32)
        fy = fy[:, None, None]
        rows = window[y0 - y0[0]] * (1 - fy) + window[y0 - y0[0] + 1] * fy
        fx = fx[None, :, None] / 255
        frame[:] = rows[:, x0 - left] * (np.float32(1 / 255) - fx) + rows[:, x0 - left + 1] * fx
    return np.clip(frames, 0, 1, out=frames)


def _taps(centre: float, scale: float, count: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the interpolation taps of each pixel of a row: the left tap's index and the right tap's weight."""
    at = np.clip(centre + (np.arange(count) - (count - 1) / 2) * scale, 0, limit - 1.001)
    first = at.astype(np.int64)
    return first, (at - first).astype(np.float32)
