"""The wider variety of training clips: livelier motion, filmed backgrounds, cuts, and results that only the reference shows.

All functions change scenes that edit_scenes.py drew, so the held-out clips, which are not varied, stay as they are.
"""

from colorsys import hsv_to_rgb, rgb_to_hsv
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .background import Backdrop, Colour, Footage
from .edit_plan import Plan
from .edit_scenes import EditScenes, backdrop_for, draw_edit_scenes, over_footage
from .labels import NONE
from .looks import LOOKS_FN, Look, PartialLook, jitter
from .random_scenes import draw_backdrop, draw_places
from .scene import Body
from .shapes import ROUND, draw_texture

TURNING, RESIZING, FAST, CROSSING = 0.45, 0.45, 0.25, 0.3  # probabilities that a clip's bodies move so
OTHERS_TOO = 0.5  # probability that an unedited body does as well
FILMED = 0.45  # probability of a picture behind a local edit that is not over moving views
CUT = 0.06  # probability of a cut, in clips that may have one
OPEN_RESULT = 0.75  # probability of a varied result where words say nothing of it
ANY_COLOUR = 0.4  # probability of a colour, or background, of any kind there
STRENGTHS = (0.2, 1.2)  # of looks: 0 is the source, 1 the look
MIN_DISTANCE = 0.25  # RGB distance of a new colour from the old one


@dataclass(frozen=True)
class Shot:
    """Consecutive frames without a cut."""

    scenes: EditScenes
    times: np.ndarray  # (F,)


def draw_shots(rng: np.random.Generator, plan: Plan, times: np.ndarray, size: tuple[int, int], footage: Footage | None = None) -> list[Shot]:
    """Draws one candidate for a plan's clip. `footage` replaces the drawn background.

    A clip with a cut has two shots with other backgrounds, places and velocities of the same bodies; the edit is the same in both. There are
    none in clips whose edited object enters late or is one of two alike, as only one shot could show it as told, and none over footage.
    """
    duration = float(times[-1])
    scenes = draw_edit_scenes(rng, plan, size, duration)
    if plan.varied:
        scenes = _vary(rng, scenes, plan, size, duration)
    if footage is not None:
        return [Shot(over_footage(scenes, footage), times)]
    if not (plan.varied and (plan.reference_shows_edit or plan.labels.edit in ("look", NONE)) and rng.uniform() < CUT):
        return [Shot(scenes, times)]
    first = int(rng.integers(1, len(times)))
    return [Shot(scenes, times[:first]), Shot(_other_shot(rng, scenes, plan, size), times[first:])]


def _vary(rng: np.random.Generator, scenes: EditScenes, plan: Plan, size: tuple[int, int], duration: float) -> EditScenes:
    """Varies motion, background and result."""
    scenes = _vary_motion(rng, scenes, plan, size, duration)
    if plan.labels.edit != "look" and rng.uniform() < FILMED:
        filmed = _backdrop_behind(rng, scenes, "picture")
        scenes = replace(scenes, backdrop=filmed, new_backdrop=filmed if scenes.new_backdrop is scenes.backdrop else scenes.new_backdrop)
    told = plan.words == "exact" or not plan.reference_shows_edit
    if told or (plan.words != "loose" and rng.uniform() >= OPEN_RESULT):
        return scenes
    return _vary_result(rng, scenes, plan, size)


def _backdrop_behind(rng: np.random.Generator, scenes: EditScenes, style: str | None = None) -> Backdrop:
    """Draws a background that contrasts with the bodies."""
    return backdrop_for(rng, [b.rgb for b in (scenes.before, scenes.after) if b is not None], [b.rgb for b in scenes.others], style)


def _vary_motion(rng: np.random.Generator, scenes: EditScenes, plan: Plan, size: tuple[int, int], duration: float) -> EditScenes:
    """Makes bodies turn, change their size, move fast and cross each other; source and target stay in step.

    Motion that no input shows stays as it is: an added body rests, and a new shape turns only as the old one is seen to. Two alike only turn.
    """
    turning, resizing, fast, crossing = (bool(rng.uniform() < odds) for odds in (TURNING, RESIZING, FAST, CROSSING))
    labels, alike = plan.labels, plan.labels.kind == "two alike"
    before, after, others = scenes.before, scenes.after, list(scenes.others)
    if before is not None:
        turns = turning and not (labels.edit == "replace" and before.shape in ROUND)
        changes = _changes(rng, size, duration, turns, resizing and not alike, fast and not alike and not plan.late)
        twins = [i for i, body in enumerate(others) if alike and (body.shape, body.colour) == (before.shape, before.colour)]
        before = _with_motion(before, changes)
        for i in twins:
            others[i] = _with_motion(others[i], changes)
        if after is not None:
            upright = labels.edit == "replace" and not plan.reference_shows_edit
            after = _with_motion(after, {name: value for name, value in changes.items() if name != "spin" or not upright})
    else:
        twins = []
    for i, body in enumerate(others):
        if i not in twins and rng.uniform() < OTHERS_TOO:
            others[i] = _with_motion(body, _changes(rng, size, duration, turning, resizing, fast))
    free = [i for i in range(len(others)) if i not in twins]
    if crossing and free:
        met, i = before or after or others[0], int(rng.choice(free))
        if others[i] is not met:
            others[i] = _crossing(rng, others[i], met, size, duration)
    return replace(scenes, before=before, after=after, others=tuple(others))


def _changes(rng: np.random.Generator, size: tuple[int, int], duration: float, turning: bool, resizing: bool, fast: bool) -> dict[str, Any]:
    """Draws new values of fields of Motion; "growth", from half to double size over the clip, replaces radius and pulse."""
    changes: dict[str, Any] = {}
    if turning:
        changes["spin"] = float(rng.choice((-1, 1)) * rng.uniform(1.5, 6.5))
    if resizing:
        changes["growth"] = float(np.exp(rng.uniform(-np.log(2), np.log(2))))
        changes["pulse"] = (changes["growth"] - 1) / float(np.clip(duration, 0.5, 1.5))
    if fast:
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0) * min(size)  # 1.0: 6 pixels a frame at 96x96 and 8 frames a second
        changes |= {"velocity": (float(speed * np.cos(angle)), float(speed * np.sin(angle))), "wobble": (0.0, 0.0)}
    return changes


def _with_motion(body: Body, changes: dict[str, Any]) -> Body:
    """The body with changed motion; a growing one starts smaller, a shrinking one larger."""
    growth = changes.get("growth", 1.0)
    motion = replace(body.motion, radius=body.motion.radius / growth**0.5, **{name: value for name, value in changes.items() if name != "growth"})
    return replace(body, motion=motion)


def _crossing(rng: np.random.Generator, body: Body, met: Body, size: tuple[int, int], duration: float) -> Body:
    """Makes the body move straight through the place where another is at that time."""
    side, start = min(size), np.array(body.motion.start)
    at = rng.uniform(0.3, 0.8) * duration
    gap = met.motion.track(np.array([at]), size)[0, :2] - start
    at = max(at, float(np.hypot(*gap)) / side)  # not faster than fast ones
    return replace(body, motion=replace(body.motion, velocity=(float(gap[0] / at), float(gap[1] / at)), wobble=(0.0, 0.0)))


def _vary_result(rng: np.random.Generator, scenes: EditScenes, plan: Plan, size: tuple[int, int]) -> EditScenes:
    """Varies what the reference shows and words do not tell; words that are not loose tell nothing at all."""
    edit, anything = plan.labels.edit, plan.words != "loose" and rng.uniform() < ANY_COLOUR
    if edit == "look":
        look = LOOKS_FN.get(plan.labels.look, scenes.look)
        assert isinstance(look, Look)
        return replace(scenes, look=PartialLook(jitter(rng, look), float(rng.uniform(*STRENGTHS))))
    if edit == "background":
        return replace(scenes, new_backdrop=_vary_backdrop(rng, scenes.new_backdrop, anything))
    before, after = scenes.before, scenes.after
    if after is None:
        return scenes
    rgb = _other_colour(rng, after.rgb, before.rgb if before is not None and edit == "recolour" else None, anything)
    after = replace(after, rgb=rgb)
    if edit == "recolour":
        return replace(scenes, after=after)
    motion = after.motion
    far = (0.25 * size[0], 0.25 * size[1]) if edit == "add" and anything else (0.35 * motion.radius,) * 2
    shift = (float(rng.uniform(-far[0], far[0])), float(rng.uniform(-far[1], far[1])))
    motion = replace(motion, shift=shift, scale=float(np.exp(rng.uniform(np.log(0.65), np.log(1.5)))), angle=float(rng.uniform(-np.pi, np.pi)))
    return replace(scenes, after=replace(after, motion=motion, texture=draw_texture(rng)))


def _other_colour(rng: np.random.Generator, rgb: Colour, old: Colour | None, anything: bool) -> Colour:
    """Draws another shade of the colour, or any colour, away from the old one."""
    while True:
        new = _any_colour(rng) if anything else shade(rng, rgb)
        if old is None or np.linalg.norm(np.subtract(new, old)) >= MIN_DISTANCE:
            return new


def _any_colour(rng: np.random.Generator) -> Colour:
    """Draws any colour."""
    red, green, blue = (float(v) for v in rng.uniform(0, 1, 3))
    return red, green, blue


def _between(colour: Colour, low: float, high: float) -> Colour:
    """Maps each channel from 0..1 to low..high."""
    red, green, blue = (low + (high - low) * v for v in colour)
    return red, green, blue


def shade(rng: np.random.Generator, rgb: Colour) -> Colour:
    """Draws another hue and shade that still have the colour's name, roughly."""
    hue, saturation, value = rgb_to_hsv(*rgb)
    saturation = saturation * rng.uniform(0.5, 1.15) if saturation > 0.2 else rng.uniform(0, 0.25)
    value = value * rng.uniform(0.6, 1.15) if value > 0.2 else rng.uniform(0, 0.3)
    red, green, blue = hsv_to_rgb((hue + rng.normal(0, 0.04)) % 1, min(float(saturation), 1.0), min(float(value), 1.0))
    return red, green, blue


def _vary_backdrop(rng: np.random.Generator, backdrop: Backdrop | Footage, anything: bool) -> Backdrop:
    """Draws a new background of the same style in other colours, widths and directions, or any; it rests, as no input shows its motion."""
    assert isinstance(backdrop, Backdrop)
    if anything:
        drawn = draw_backdrop(rng)
        still = None if drawn.camera is None else replace(drawn.camera, drift=(0.0, 0.0), zoom=0.0)
        return replace(drawn, camera=still, slide=0.0)
    if backdrop.camera is not None:
        camera = replace(backdrop.camera, start=(float(rng.uniform()), float(rng.uniform())), cover=float(rng.uniform(0.2, 0.6)))
        first, second = _between(_any_colour(rng), 0.0, 0.35), _between(_any_colour(rng), 0.6, 1.0)
        return replace(backdrop, first=first, second=second, camera=camera)
    angle = rng.uniform(0, 2 * np.pi)
    colours = (_any_colour(rng), _any_colour(rng)) if rng.uniform() < 0.5 else (shade(rng, backdrop.first), shade(rng, backdrop.second))
    return replace(backdrop, first=colours[0], second=colours[1], direction=(float(np.cos(angle)), float(np.sin(angle))), period=float(rng.uniform(0.25, 0.5)))


def _other_shot(rng: np.random.Generator, scenes: EditScenes, plan: Plan, size: tuple[int, int]) -> EditScenes:
    """Draws the shot after a cut: another background, and the same bodies elsewhere. An added body stays, since only the first shot's place is shown."""
    num = len(scenes.others)
    start, *places = draw_places(rng, size, 1 + num)
    before, after = (
        body if body is None or plan.labels.edit == "add" else replace(body, motion=replace(body.motion, start=start)) for body in (scenes.before, scenes.after)
    )
    others = tuple(replace(body, motion=replace(body.motion, start=place)) for body, place in zip(scenes.others, places))
    moved = replace(scenes, before=before, after=after, others=others)
    style = "picture" if plan.labels.edit == "look" or rng.uniform() < FILMED else None
    backdrop = _backdrop_behind(rng, moved, style)
    return replace(moved, backdrop=backdrop, new_backdrop=backdrop if scenes.new_backdrop is scenes.backdrop else scenes.new_backdrop)
