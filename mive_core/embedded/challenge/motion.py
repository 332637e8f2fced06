"""Motion of the objects: fast curves, rotation, growth, crossings and late entries.

A track is (F, 4): x, y, radius and angle of each frame, in pixels and radians. `size` is (width, height).
"""

import numpy as np

SPEEDS = (2.0, 6.0)  # range of the peak speed, pixels per frame
SPINS = (0.05, 0.22)  # radians per frame, in either direction
RADII = (0.15, 0.25)  # of the frame's shorter side
GROWTH = (0.65, 1.5)  # ratio of the last radius to the first
MARGIN = 0.14  # of the frame, kept between a centre and the border
ENTRY_SPEED = 5.0
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis and direction
NUM_TRIES = 40


def draw_track(rng: np.random.Generator, size: tuple[int, int], num_frames: int, meets: np.ndarray | None = None) -> np.ndarray:
    """Draws a track; with `meets`, another track, it passes through that one's place in the middle of the clip."""
    times, middle = np.arange(num_frames), num_frames // 2
    for _ in range(NUM_TRIES):
        amplitude = rng.uniform(0.12, 0.34, 2) * size
        heading = rng.uniform(0, 2 * np.pi)
        rate = rng.uniform(*SPEEDS) * np.array([np.cos(heading), np.sin(heading)]) / amplitude
        wave = amplitude * np.sin(rate * times[:, None] + rng.uniform(0, 2 * np.pi, 2))
        room = np.maximum(np.array(size) * (1 - 2 * MARGIN) - 2 * amplitude, 0)
        centre = np.array(size) / 2 + rng.uniform(-0.5, 0.5, 2) * room
        if meets is not None:
            centre = meets[middle, :2] - wave[middle]
        places = centre + wave
        if ((places > MARGIN * np.array(size)) & (places < (1 - MARGIN) * np.array(size))).all():
            break
    share = times / max(num_frames - 1, 1)
    radius = rng.uniform(*RADII) * min(size) * rng.uniform(*GROWTH) ** (share - 0.5)
    angle = rng.uniform(-0.5, 0.5) + rng.choice((-1, 1)) * rng.uniform(*SPINS) * times
    return np.stack([*places.T, radius, angle], axis=1)


def enter(track: np.ndarray, side: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the track with a start outside the frame, from which it comes in over at most three quarters of the clip."""
    axis, direction = SIDES[side]
    reach = 1.4 * track[0, 2] + 2
    offset = reach + (track[0, axis] if direction < 0 else size[axis] - track[0, axis])
    num_frames = min(offset / ENTRY_SPEED, 0.75 * len(track))
    entered = track.copy()
    entered[:, axis] += direction * offset * np.clip(1 - np.arange(len(track)) / num_frames, 0, None)
    return entered
