"""Scenes of bodies that move over a backdrop, and their rendering.

F frames, H x W pixels; times are in units of two seconds, so a 17-frame clip at 8 fps runs from 0 to 1.
"""

from dataclasses import dataclass

import numpy as np

from .background import Backdrop, Colour
from .shapes import REACH, Texture, coverage

TIME_UNIT = 2.0  # seconds


@dataclass(frozen=True)
class Motion:
    """A drift that bounces off the frame's walls, a wobble and a slow rotation; optionally an entry from outside. In pixels."""

    start: tuple[float, float]
    velocity: tuple[float, float]
    wobble: tuple[float, float]  # amplitude
    phase: float
    rate: float  # wobbles per time unit
    angle: float  # radians, at time 0
    spin: float  # radians per time unit
    radius: float
    pulse: float  # relative change of the radius per time unit
    entry: tuple[float, float] = (0.0, 0.0)  # initial offset from the path, which decays to zero
    entry_time: float = 1.0  # time at which the offset reaches zero
    shift: tuple[float, float] = (0.0, 0.0)  # constant offset from the path
    scale: float = 1.0  # factor on the radius; the path does not depend on it

    def track(self, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Returns the trajectory: times (F,) -> (F, 4) of x, y, radius, angle."""
        wave = np.sin(2 * np.pi * (self.rate * times + self.phase)) - np.sin(2 * np.pi * self.phase)
        radius = self.scale * self.radius * (1 + self.pulse * np.clip(times, 0, 1.5))
        remaining = (1 - np.minimum(times / self.entry_time, 1)) ** 2
        columns = []
        for start, velocity, wobble, entry, shift, length in zip(self.start, self.velocity, self.wobble, self.entry, self.shift, size):
            wall = min(0.8 * self.radius, length / 2 - 1)
            room = length - 2 * wall
            folded = room - np.abs((start - wall + velocity * times + wobble * wave) % (2 * room) - room)
            columns.append(wall + folded + entry * remaining + shift)
        return np.stack([*columns, radius, self.angle + self.spin * times], axis=1)


@dataclass(frozen=True)
class Body:
    """A moving shape."""

    shape: str
    colour: str  # name
    rgb: Colour
    texture: Texture
    motion: Motion


@dataclass(frozen=True)
class Layer:
    """A rendered body, cropped to its bounding box over all frames."""

    box: tuple[slice, slice]  # rows, columns
    cover: np.ndarray  # (F, h, w) opacity in 0..1
    paint: np.ndarray  # (F, h, w, 3) colour


@dataclass(frozen=True)
class Scene:
    """A background and the bodies in front of it."""

    backdrop: Backdrop
    bodies: tuple[Body, ...]  # from the back to the front


def render_body(body: Body, times: np.ndarray, size: tuple[int, int]) -> Layer:
    """Renders a body at times (F,)."""
    track = body.motion.track(times, size).astype(np.float32)
    reach = track[:, 2] * np.float32(REACH) + 1
    columns, rows = (_span(track[:, axis], reach, length) for axis, length in enumerate(size))
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, None, :] + np.float32(0.5) - track[:, 0, None, None]
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[None, :, None] + np.float32(0.5) - track[:, 1, None, None]
    radius = track[:, 2, None, None]
    cos, sin = (f(track[:, 3].astype(np.float64)).astype(np.float32)[:, None, None] / radius for f in (np.cos, np.sin))
    x, y = x * cos + y * sin, y * cos - x * sin
    return Layer((rows, columns), coverage(body.shape, x, y, radius), body.texture.paint(body.rgb, x, y))


def _span(centres: np.ndarray, reach: np.ndarray, length: int) -> slice:
    """Returns the pixels that the body touches in any frame; at least one, so that arrays are never empty."""
    low = int(np.clip(np.floor((centres - reach).min()), 0, length - 1))
    return slice(low, int(np.clip(np.ceil((centres + reach).max()), low + 1, length)))


def compose(background: np.ndarray, layers: list[Layer]) -> np.ndarray:
    """Composites layers from back to front over (F, H, W, 3) -> a new (F, H, W, 3). Exact where the opacity is 0 or 1."""
    frames = background.copy()
    for layer in layers:
        rows, columns = layer.box
        cover = layer.cover[..., None]
        frames[:, rows, columns] = frames[:, rows, columns] * (1 - cover) + layer.paint * cover
    return np.clip(frames, 0, 1, out=frames)


def visible(layers: list[Layer], index: int, frame_shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the visible part of one layer behind those in front of it, (F, H, W) in 0..1."""
    seen = np.zeros(frame_shape, np.float32)
    rows, columns = layers[index].box
    seen[:, rows, columns] = layers[index].cover
    for layer in layers[index + 1 :]:
        rows, columns = layer.box
        seen[:, rows, columns] *= 1 - layer.cover
    return seen


def render(scene: Scene, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Renders the whole scene: times (F,) -> (F, H, W, 3) float32 in 0..1."""
    return compose(scene.backdrop.render(times, size), [render_body(body, times, size) for body in scene.bodies])
