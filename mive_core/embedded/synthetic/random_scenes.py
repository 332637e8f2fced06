"""Random scenes. The functions that take a generator return frozen objects."""

from collections.abc import Iterable, Sequence

import numpy as np

from .background import Backdrop, Colour, draw_camera
from .labels import RGB
from .looks import LOOKS_FN, draw_grade, draw_look
from .natural_images import PICTURES, is_gray
from .scene import TIME_UNIT, Body, Motion, Scene, render
from .shapes import DISTANCES, draw_texture

STYLE_ODDS = {"flat": 0.22, "gradient": 0.2, "stripes": 0.05, "checkers": 0.05, "picture": 0.48}


def draw_backdrop(rng: np.random.Generator, style: str | None = None) -> Backdrop:
    """Draws a background of the given style or picture name, or of any style."""
    style = style or str(rng.choice(list(STYLE_ODDS), p=list(STYLE_ODDS.values())))
    if style == "picture":
        style = str(rng.choice(PICTURES))
    if style in PICTURES:
        first, second = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if is_gray(style) and rng.uniform() < 0.7:
            first, second = _muted(rng, 0.0, 0.35), _muted(rng, 0.6, 1.0)
        grade = draw_grade(rng) if rng.uniform() < 0.4 else None
        return Backdrop(style, first, second, camera=draw_camera(rng), flip=bool(rng.uniform() < 0.5), grade=grade)
    angle = rng.uniform(0, 2 * np.pi)
    first, second = _muted(rng, 0.05, 0.95), _muted(rng, 0.05, 0.95)
    if style in ("stripes", "checkers"):
        second = _colour(np.clip(v + rng.choice((-0.2, 0.2)), 0, 1) for v in first)
    return Backdrop(style, first, second, (float(np.cos(angle)), float(np.sin(angle))), float(rng.uniform(-0.5, 0.5)), float(rng.uniform(0.25, 0.5)))


def _muted(rng: np.random.Generator, low: float, high: float) -> Colour:
    """Draws a colour that is less saturated than the shapes' colours."""
    value, hue = rng.uniform(low, high), rng.normal(0, 0.12, 3)
    return _colour(np.clip(value + hue, 0, 1))


def _colour(values: Iterable[float]) -> Colour:
    """Three numbers of any type -> floats."""
    red, green, blue = (float(v) for v in values)
    return red, green, blue


def draw_motion(rng: np.random.Generator, size: tuple[int, int], start: tuple[float, float], diameter: float) -> Motion:
    """Draws a slow motion from a starting point, for a body of that diameter in pixels."""
    side, angle = min(size), rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.05, 0.3) * side
    wobble = rng.uniform(0, 0.08, 2) * side
    return Motion(
        start,
        (float(speed * np.cos(angle)), float(speed * np.sin(angle))),
        (float(wobble[0]), float(wobble[1])),
        float(rng.uniform()),
        float(rng.uniform(0.6, 1.2)),
        float(rng.normal(0, 0.12)),
        float(rng.normal(0, 0.25)),
        diameter / 2,
        float(rng.uniform(-0.12, 0.12)),
    )


def draw_places(rng: np.random.Generator, size: tuple[int, int], num: int, taken: Sequence[tuple[float, float]] = ()) -> list[tuple[float, float]]:
    """Draws centres in pixels, far from each other and from those already taken."""
    places = [np.array(place) for place in taken]
    for _ in range(num):
        candidates = rng.uniform(0.18, 0.82, (8, 2)) * size
        gaps = [min((float(np.hypot(*(c - p))) for p in places), default=0.0) for c in candidates]
        places.append(candidates[int(np.argmax(gaps))])
    return [(float(x), float(y)) for x, y in places[len(taken) :]]


def tint(rng: np.random.Generator, colour: str, jitter: float = 0.04) -> Colour:
    """Draws a colour within `jitter` of a named one in each channel."""
    return _colour(np.clip(np.array(RGB[colour]) + rng.uniform(-jitter, jitter, 3), 0, 1))


def draw_scene(rng: np.random.Generator, size: tuple[int, int], num_bodies: int) -> Scene:
    """Draws a scene without an edit."""
    bodies = []
    for place in draw_places(rng, size, num_bodies):
        colour = str(rng.choice(list(RGB)))
        motion = draw_motion(rng, size, place, rng.uniform(0.27, 0.5) * min(size))
        bodies.append(Body(str(rng.choice(list(DISTANCES))), colour, tint(rng, colour), draw_texture(rng), motion))
    return Scene(draw_backdrop(rng, None if bodies else "picture"), tuple(bodies))


def clip_times(num_frames: int, fps: float) -> np.ndarray:
    """Returns the frames' times, (F,) float64 in time units."""
    return np.arange(num_frames) / (fps * TIME_UNIT)


def random_clip(seed: int, size: tuple[int, int] = (96, 96), num_frames: int = 17) -> np.ndarray:
    """Draws an unedited clip of the kind that sources and targets are, for training a VAE: (F, H, W, 3) float32 in 0..1.

    size is (width, height).
    """
    rng = np.random.default_rng((seed, 7))
    scene = draw_scene(rng, size, int(rng.choice(5, p=(0.12, 0.13, 0.3, 0.3, 0.15))))
    frames = render(scene, clip_times(num_frames, 8.0), size)
    u = rng.uniform()
    if u < 0.12:
        return LOOKS_FN[str(rng.choice(list(LOOKS_FN)))](frames)
    return draw_look(rng)(frames) if u < 0.24 else frames
