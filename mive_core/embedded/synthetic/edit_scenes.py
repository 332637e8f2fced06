"""Draws the source and target scenes of a plan, which differ by the edit alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .background import Backdrop, Camera, Colour, Footage
from .edit_plan import Plan
from .labels import COLOURS, NONE, PLACES, RGB, SHAPES, EditLabels
from .looks import LOOKS_FN, Look, PartialLook, draw_look
from .random_scenes import draw_backdrop, draw_motion, draw_places, tint
from .scene import Body, Motion
from .shapes import REACH, ROUND, Texture, draw_texture

ENTRY_TIME = 1.1  # entry time of late objects, in clips of at most one time unit
CONTRAST = 0.4  # sufficient RGB distance of a colour from its background
PICTURE_TINTS = {"grass": ((0.02, 0.12, 0.02), (0.45, 0.85, 0.25)), "bricks": ((0.18, 0.03, 0.02), (0.95, 0.50, 0.38))}
PLAIN = Texture("plain", (0.0, 1.0), 0.0, 0.0)


@dataclass(frozen=True)
class EditScenes:
    """The source scene is backdrop, others and `before`; the target scene is new_backdrop, others and `after`, then the look."""

    backdrop: Backdrop | Footage
    others: tuple[Body, ...]  # from the back to the front
    depth: int  # number of others behind the edited body
    before: Body | None
    after: Body | None
    new_backdrop: Backdrop | Footage
    look: Look | PartialLook | None = None
    named_place: str = NONE  # the place that the instruction names for an added body


def draw_edit_scenes(rng: np.random.Generator, plan: Plan, size: tuple[int, int], duration: float) -> EditScenes:
    """Draws one candidate for the plan's scenes; duration is in time units. Visibility of the edit is checked after rendering."""
    labels = plan.labels
    if labels.edit == "look":
        return _look_scenes(rng, plan, size)
    if labels.edit == NONE:
        others = _unedited_bodies(rng, plan.said or plan, size, draw_places(rng, size, int(rng.integers(1, 5))))
        backdrop = backdrop_for(rng, [b.rgb for b in others])
        return EditScenes(backdrop, others, len(others), None, None, backdrop)
    if labels.edit == "background":
        others = _unedited_bodies(rng, plan, size, draw_places(rng, size, int(rng.integers(2, 5))))
        new = _new_backdrop(rng, plan)
        old = backdrop_for(rng, [b.rgb for b in others])
        return EditScenes(old, others, len(others), None, None, new)
    body, distractor, place = _edited_body(rng, plan, size, ENTRY_TIME * min(duration, 1.0))
    num_extras = int(rng.integers(0, 2)) if distractor else int(rng.integers(1, 4))
    taken = [b.motion.start for b in (body, distractor) if b is not None and not plan.late]
    extras = _unedited_bodies(rng, plan, size, draw_places(rng, size, num_extras, taken))
    others = (*extras, distractor) if distractor else extras
    others = tuple(others[int(i)] for i in rng.permutation(len(others)))
    depth = len(others) if rng.uniform() < 0.6 else int(rng.integers(len(others) + 1))
    after = None if labels.edit == "remove" else _edited_result(rng, plan, body)
    before = None if labels.edit == "add" else body
    backdrop = backdrop_for(rng, [b.rgb for b in (before, after) if b is not None], [b.rgb for b in extras])
    return EditScenes(backdrop, others, depth, before, after, backdrop, named_place=place)


def over_footage(scenes: EditScenes, footage: Footage) -> EditScenes:
    """The same scenes with the drawn background replaced; a new background, if the edit draws one, stays."""
    return replace(scenes, backdrop=footage, new_backdrop=footage if scenes.new_backdrop is scenes.backdrop else scenes.new_backdrop)


def _look_scenes(rng: np.random.Generator, plan: Plan, size: tuple[int, int]) -> EditScenes:
    """Draws the scenes of a global look."""
    backdrop = draw_backdrop(rng, "picture" if rng.uniform() < 0.75 else None)
    min_extras = 0 if backdrop.camera else 2
    others = _unedited_bodies(rng, plan, size, draw_places(rng, size, int(rng.integers(min_extras, 4))))
    look = draw_look(rng) if plan.labels.look == "match" else LOOKS_FN[plan.labels.look]
    return EditScenes(backdrop, others, len(others), None, None, backdrop, look)


def _unedited_bodies(rng: np.random.Generator, plan: Plan, size: tuple[int, int], places: list[tuple[float, float]]) -> tuple[Body, ...]:
    """Draws bodies that the edit leaves unchanged; none can be mistaken for the edited one or blends into a new background."""
    labels, bodies, used = plan.labels, [], {(plan.labels.shape, plan.labels.colour), (plan.labels.new_shape, plan.labels.new_colour)}
    excluded = {labels.new_colour, plan.second_colour} if labels.edit == "background" else set()
    if rng.uniform() < 0.7:
        excluded = excluded | {labels.colour, labels.new_colour}
    for place in places:
        while True:
            shape, colour = str(rng.choice(SHAPES[1:])), str(rng.choice(COLOURS[1:]))
            if (shape, colour) not in used and colour not in excluded:
                break
        used.add((shape, colour))
        motion = draw_motion(rng, size, place, rng.uniform(0.25, 0.46) * min(size))
        bodies.append(Body(shape, colour, tint(rng, colour), draw_texture(rng), motion))
    return tuple(bodies)


def _edited_body(rng: np.random.Generator, plan: Plan, size: tuple[int, int], entry_time: float) -> tuple[Body, Body | None, str]:
    """Draws the edited body, its identical distractor (kind 'two alike' only), and the named place of an added body."""
    labels, side = plan.labels, min(size)
    shape, colour = (labels.new_shape, labels.new_colour) if labels.edit == "add" else (labels.shape, labels.colour)
    motion = draw_motion(rng, size, (0.0, 0.0), rng.uniform(0.32, 0.55) * side)
    body = Body(shape, colour, tint(rng, colour), draw_texture(rng), _observable_motion(motion, labels))
    if labels.edit == "add" and not plan.reference_shows_edit:
        still = Motion((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 0.0, 1.0, 0.0, 0.0, 0.21 * side, 0.0)
        body = Body(shape, colour, RGB[colour], PLAIN, still)  # nothing random: the instruction determines it completely
    if labels.kind == "two alike":
        return *_identical_pair(rng, plan, size, body, entry_time), NONE
    if plan.late:
        return _enter(rng, body, plan.side, size, entry_time, exact=labels.edit == "add"), None, NONE
    if labels.edit != "add":
        return _at(body, draw_places(rng, size, 1)[0]), None, NONE
    index = int(rng.integers(1, len(PLACES)))
    column, row = (index - 1) % 3, (index - 1) // 3
    return _at(body, ((0.22 + 0.28 * column) * size[0], (0.22 + 0.28 * row) * size[1])), None, PLACES[index]


def _observable_motion(motion: Motion, labels: EditLabels) -> Motion:
    """Removes motion that no input shows: all motion of an added body, and the rotation of a round body that gets a new shape."""
    if labels.edit == "add":
        return replace(motion, velocity=(0.0, 0.0), wobble=(0.0, 0.0), spin=0.0, pulse=0.0)
    if labels.edit == "replace" and labels.shape in ROUND:
        return replace(motion, angle=0.0, spin=0.0)
    return motion


def _identical_pair(rng: np.random.Generator, plan: Plan, size: tuple[int, int], body: Body, entry_time: float) -> tuple[Body, Body]:
    """Draws two identical bodies, the edited one first, that differ in position or size; they move in parallel, so that `pick` stays valid throughout."""
    pick, side = plan.labels.pick, min(size)
    axis = 0 if pick in ("left", "right") else 1 if pick in ("upper", "lower") else int(rng.integers(2))
    first, second = np.empty(2), np.empty(2)
    first[axis], second[axis] = rng.uniform(0.24, 0.3) * size[axis], rng.uniform(0.7, 0.76) * size[axis]
    first[1 - axis], second[1 - axis] = rng.uniform(0.3, 0.7, 2) * size[1 - axis]
    if pick in ("right", "lower") or (pick in ("larger", "smaller") and rng.uniform() < 0.5):
        first, second = second, first
    radii = {"larger": (0.26, 0.14), "smaller": (0.14, 0.26)}.get(pick, (0.2, 0.2))
    vx, vy = (float(v) for v in rng.uniform(-0.08, 0.08, 2) * side)
    pair = []
    for place, radius in zip((first, second), radii):
        motion = replace(body.motion, velocity=(vx, vy), wobble=(0.02 * side, 0.03 * side), radius=radius * side, pulse=0.0)
        one = _at(replace(body, motion=motion), (float(place[0]), float(place[1])))
        pair.append(_start_outside(one, _nearest_side(place, size), size, entry_time) if plan.late else one)
    return pair[0], pair[1]


def _at(body: Body, place: tuple[float, float]) -> Body:
    """The body with another starting point."""
    return replace(body, motion=replace(body.motion, start=place))


def _enter(rng: np.random.Generator, body: Body, side: str, size: tuple[int, int], entry_time: float, exact: bool) -> Body:
    """Makes the body enter from a side and come to rest, or drift on slowly, well inside; `exact` leaves nothing random."""
    axis, length = (0, size[0]) if side in ("left", "right") else (1, size[1])
    inside = body.motion.radius + (0.12 if exact else rng.uniform(0.04, 0.2)) * min(size)
    place = [0.5 * n if exact else float(rng.uniform(0.25, 0.75)) * n for n in size]
    place[axis] = float(inside if side in ("left", "top") else length - inside)
    vx, vy = body.motion.velocity
    slow = replace(body, motion=replace(body.motion, velocity=(0.4 * vx, 0.4 * vy)))
    return _start_outside(_at(slow, (place[0], place[1])), side, size, entry_time)


def _start_outside(body: Body, side: str, size: tuple[int, int], entry_time: float) -> Body:
    """Makes the body start just outside the frame on that side."""
    axis, length = (0, size[0]) if side in ("left", "right") else (1, size[1])
    beyond = REACH * body.motion.radius + 2.0
    at = body.motion.start[axis]
    offset = [0.0, 0.0]
    offset[axis] = float(-at - beyond if side in ("left", "top") else length - at + beyond)
    return replace(body, motion=replace(body.motion, entry=(offset[0], offset[1]), entry_time=entry_time))


def _nearest_side(place: np.ndarray, size: tuple[int, int]) -> str:
    """Returns the side of the frame that is nearest to a place."""
    gaps = {"left": place[0], "right": size[0] - place[0], "top": place[1], "bottom": size[1] - place[1]}
    return min(gaps, key=lambda side: gaps[side])


def _edited_result(rng: np.random.Generator, plan: Plan, body: Body) -> Body:
    """Returns the body after the edit, with all unmentioned properties kept. A new shape that only the instruction describes is upright and untextured."""
    labels = plan.labels
    if labels.edit == "add":
        return body
    same_colour = labels.new_colour == labels.colour
    rgb = body.rgb if same_colour else tint(rng, labels.new_colour) if plan.reference_shows_edit else RGB[labels.new_colour]
    if labels.edit == "replace" and not plan.reference_shows_edit:
        body = replace(body, texture=PLAIN, motion=replace(body.motion, angle=0.0, spin=0.0))
    return replace(body, shape=labels.new_shape, colour=labels.new_colour, rgb=rgb)


def _new_backdrop(rng: np.random.Generator, plan: Plan) -> Backdrop:
    """Draws the new background. It is static, because no input shows its motion: the source has another one and the reference is a single frame."""
    style = plan.labels.background
    if style in ("bricks", "grass", "gravel", "stars"):
        first, second = PICTURE_TINTS.get(style, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
        return Backdrop(style, first, second, camera=Camera((0.5, 0.5), (0.0, 0.0), 0.3, 0.0))
    first, second = RGB[plan.labels.new_colour], RGB[plan.second_colour]
    sideways = style == "stripes" and rng.uniform() < 0.5
    return Backdrop(style, first, second, (1.0, 0.0) if sideways else (0.0, 1.0), period=0.5)


def backdrop_for(rng: np.random.Generator, main: Sequence[Colour], rest: Sequence[Colour] = (), style: str | None = None) -> Backdrop:
    """Draws a background, of the style if one is given, that contrasts with the colours, the main ones above all: the best of several draws."""
    best_score = -1.0
    for _ in range(12):
        backdrop = draw_backdrop(rng, style)
        score = min(_contrast(backdrop, main), 0.1 + _contrast(backdrop, rest))
        if score > best_score:
            best, best_score = backdrop, score
        if score >= CONTRAST:
            break
    return best


def _contrast(backdrop: Backdrop, colours: Sequence[Colour]) -> float:
    """Returns the smallest RGB distance between the colours and the background; 1 without colours."""
    return min((float(np.linalg.norm(np.array(c) - tone)) for c in colours for tone in backdrop.tones()), default=1.0)
