"""The pairs of the challenge set: kinds, edits, scenes and their two renderings. F frames, H x W pixels; `size` is (W, H)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...evaluation.evaluate import LOOK_STRENGTHS
from ...evaluation.metrics import MIN_CHANGED, VISIBLE
from ...media.fit import check_request_frames, check_request_size
from ...types import Clip, EditRequest, PairedEdit
from .backdrops import draw_backdrop, draw_noise
from .instructions import LOOK_NAMES, PICKS, choice, with_article, write_sentence
from .looks import LOOKS, STRENGTHS, apply_look
from .motion import SIDES, draw_track, enter
from .outlines import OUTLINES, blob, coverage

FPS = 8.0
RGB = {
    "red": (0.76, 0.14, 0.20),
    "orange": (0.92, 0.46, 0.14),
    "yellow": (0.90, 0.83, 0.24),
    "green": (0.18, 0.54, 0.26),
    "cyan": (0.22, 0.74, 0.80),
    "blue": (0.16, 0.28, 0.74),
    "pink": (0.90, 0.50, 0.70),
    "white": (0.92, 0.91, 0.88),
    "black": (0.11, 0.10, 0.12),
}
RGB_JITTER = 0.04
SHADE = 0.14  # how much lighter or darker than its colour an object is at its edges
OBJECT_EDITS = ("recolour", "replace", "remove")
EDITS = (*OBJECT_EDITS, "background", "look", "keep", "absent")
KIND_EDITS = {
    "seen in reference": (*OBJECT_EDITS, "background", "look"),
    "enters late": OBJECT_EDITS,
    "two alike": OBJECT_EDITS,
    "words alone": (*OBJECT_EDITS, "background"),
    "vague words": (*OBJECT_EDITS, "background", "look"),
    "wrong words": (*OBJECT_EDITS, "background", "look"),  # the reference is the truth
    "nothing asked": ("keep", "absent"),  # absent: an edit of an object that is not there
    LOOK_STRENGTHS: ("look",),  # one look of one clip in each of STRENGTHS, under one instruction
}
KINDS = tuple(KIND_EDITS)
MIN_GAP = 1.6  # between the centres of bodies that cross, in the first frame and in mean radii
MIN_RATIO = 1.3  # of their sizes, to tell them apart by these
MIN_VISIBLE = 0.4  # share of the edited region that must change visibly
MAX_CANDIDATES = 4000  # drawn for one clip


@dataclass(frozen=True)
class Body:
    """An object. Without a shape's name it is a blob that no instruction speaks of."""

    shape: str
    colour: str
    rgb: np.ndarray
    outline: tuple[np.ndarray, ...]
    track: np.ndarray  # (F, 4)
    light: float  # direction of the shading, radians

    @property
    def noun(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class ChallengePairs:
    """Pairs that depend only on seed and index; the kinds and edits take turns."""

    seed: int
    size: tuple[int, int]
    num_frames: int
    kinds: tuple[str, ...] = KINDS
    edits: tuple[str, ...] = EDITS
    footage: Tensor | None = None  # (N, H, W, 3) in 0..1, behind the objects instead of noise

    def __post_init__(self):
        check_request_size(self.size)
        check_request_frames(self.num_frames)
        if not self.turns:
            known = "; ".join(f"{kind}: {', '.join(edits)}" for kind, edits in KIND_EDITS.items())
            raise UserError("no pair is of these kinds and edits", got=f"kinds {self.kinds}, edits {self.edits}", expected=known)
        if self.footage is not None and len(self.footage) < self.num_frames:
            raise UserError("the footage is shorter than the pairs", where="source", got=f"{len(self.footage)} frames", expected=f"{self.num_frames} or more")

    @property
    def turns(self) -> list[tuple[str, str, int]]:
        """(kind, edit, position in STRENGTHS) of the pairs, until they repeat: first an edit of each kind, then the next of each."""
        rounds = max(len(edits) for edits in KIND_EDITS.values())
        single = [(kind, edits[i], 0) for i in range(rounds) for kind, edits in KIND_EDITS.items() if i < len(edits) and kind != LOOK_STRENGTHS]
        turns = [*single, *((LOOK_STRENGTHS, "look", i) for i in range(len(STRENGTHS)))]
        return [turn for turn in turns if turn[0] in self.kinds and turn[1] in self.edits]

    def pairs(self, num_pairs: int) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
        """Yields the first pairs, each with its kind and edit."""
        return (self.sample(index) for index in range(num_pairs))

    def sample(self, index: int) -> tuple[PairedEdit, dict[str, str]]:
        """Draws until the edit is visible, and shown by frame 0 unless it enters late. Raises UserError where that never comes true."""
        cycle, turn = divmod(index, len(self.turns))
        kind, edit, position = self.turns[turn]
        rng = np.random.default_rng([self.seed, index - position])
        look = tuple(LOOKS)[cycle % len(LOOKS)] if kind == LOOK_STRENGTHS else choice(rng, tuple(LOOKS))
        strength = STRENGTHS[position] if kind == LOOK_STRENGTHS else float(rng.uniform(0.3, 1))
        candidates = (self._draw(rng, kind, edit, look, strength) for _ in range(MAX_CANDIDATES))
        pair = next((pair for pair in candidates if pair is not None), None)
        if pair is None:
            width, height = self.size
            raise UserError(
                f"no clip of the kind {kind!r} and the edit {edit!r} can be drawn so",
                where="challenge",
                got=f"{self.num_frames} frames of {width}x{height}",
                fix="take more frames, or leave the kind out",
            )
        return replace(pair, name=f"challenge-{self.seed}-{index}"), {"kind": kind, "edit": look if kind == LOOK_STRENGTHS else edit}

    def _draw(self, rng: np.random.Generator, kind: str, edit: str, look: str, strength: float) -> PairedEdit | None:
        """Draws one candidate; None if its edit cannot be seen or told."""
        backdrop = draw_backdrop(rng, self.size, self.num_frames, None if self.footage is None else self.footage.numpy())
        shapes, colours = ([str(name) for name in rng.permutation(list(names))] for names in (OUTLINES, RGB))
        bodies, place = self._draw_bodies(rng, kind, shapes, colours)
        body, other = bodies[place], bodies[3 - place]
        it, pick = f"the {body.noun}", _tell_apart(body, other)
        if pick is None:
            return None
        if kind == "two alike":
            it = PICKS[pick].format(thing=body.noun)
        after, new_backdrop, what = self._edit(rng, kind, edit, body, backdrop, shapes, colours)
        covers = [coverage(each.outline, each.track, self.size) for each in bodies]
        new_cover = coverage(after.outline, after.track, self.size) if after else np.zeros_like(covers[place])
        source = _compose(backdrop, bodies, covers)
        target = _compose(new_backdrop, [*bodies[:place], after, *bodies[place + 1 :]], [*covers[:place], new_cover, *covers[place + 1 :]])
        if edit == "look":
            target, what = apply_look(look, strength, target), LOOK_NAMES[look]
        mask = _edited_mask(edit, place, covers, new_cover)
        if edit in OBJECT_EDITS and not _is_visible(source, target, mask, late=kind == "enters late"):
            return None
        words = {"it": it, "it_bare": it.removeprefix("the "), "new": after.colour if after else "", "what": what}
        request = EditRequest(
            Clip(torch.from_numpy(source), FPS),
            torch.from_numpy((source if kind == "words alone" else target)[0].copy()),
            _instruct(rng, kind, edit, look, words, shapes, colours),
        )
        red, green, blue = (after or body).rgb.tolist()
        return PairedEdit(
            request, torch.from_numpy(target), None if mask is None else torch.from_numpy(mask), colour=(red, green, blue) if edit in OBJECT_EDITS else None
        )

    def _draw_bodies(self, rng: np.random.Generator, kind: str, shapes: list[str], colours: list[str]) -> tuple[list[Body], int]:
        """Draws a blob and, in front of it, the edited body and one that crosses its way -> these, and the index of the edited one, 1 or 2."""
        track = draw_track(rng, self.size, self.num_frames)
        if kind == "enters late":
            track = enter(track, choice(rng, tuple(SIDES)), self.size)
        body, other = (
            Body(shape, colour, _draw_rgb(rng, colour), OUTLINES[shape], way, float(rng.uniform(0, 2 * np.pi)))
            for shape, colour, way in zip(shapes, colours, (track, draw_track(rng, self.size, self.num_frames, meets=track)))
        )
        if kind == "two alike":
            other = replace(body, track=other.track)
        clutter = Body("", "", rng.uniform(0.1, 0.9, 3), (blob(rng),), draw_track(rng, self.size, self.num_frames), 0.0)
        return ([clutter, body, other], 1) if rng.uniform() < 0.5 else ([clutter, other, body], 2)

    def _edit(
        self, rng: np.random.Generator, kind: str, edit: str, body: Body, backdrop: np.ndarray, shapes: list[str], colours: list[str]
    ) -> tuple[Body | None, np.ndarray, str]:
        """Returns the body and the background after the edit, and the new thing in words."""
        if edit == "remove":
            return None, backdrop, ""
        if edit == "background":
            flat = kind == "words alone" or rng.uniform() < 0.5
            low, high = (_draw_rgb(rng, colour) for colour in colours[2:4])
            new = np.broadcast_to(low, backdrop.shape) if flat else draw_noise(rng, self.size, self.num_frames, low, high)
            return body, new, f"plain {colours[2]}" if flat else f"{colours[2]} and {colours[3]} clouds"
        if edit == "recolour" or (edit == "replace" and rng.uniform() < 0.5):
            body = replace(body, colour=colours[2], rgb=_draw_rgb(rng, colours[2]))
        if edit == "replace":
            body = replace(body, shape=shapes[2], outline=OUTLINES[shapes[2]])
        return body, backdrop, with_article(body.noun)


def _edited_mask(edit: str, place: int, covers: list[np.ndarray], new_cover: np.ndarray) -> np.ndarray | None:
    """(F, H, W) bool: what the edit changes; None for looks, which change everything."""
    if edit == "look":
        return None
    if edit == "background":
        return np.prod([1 - cover for cover in covers], axis=0) > 0
    if edit not in OBJECT_EDITS:
        return np.zeros_like(new_cover, dtype=bool)
    return np.maximum(covers[place], new_cover) * np.prod([1 - cover for cover in covers[place + 1 :]], axis=0) > 0


def _instruct(rng: np.random.Generator, kind: str, edit: str, look: str, words: dict[str, str], shapes: list[str], colours: list[str]) -> str:
    """Draws the instruction: `words` are the true ones; the last shapes and colours are in no body of the clip."""
    if kind == "vague words":
        return write_sentence(rng, "vague", words)
    missing, what = f"{colours[4]} {shapes[3]}", with_article(f"{colours[5]} {shapes[4]}")
    if edit == "absent":
        return write_sentence(rng, choice(rng, OBJECT_EDITS), {"it": f"the {missing}", "it_bare": missing, "new": colours[5], "what": what})
    if kind != "wrong words":
        return write_sentence(rng, edit, words)
    if edit == "background":
        what = f"plain {colours[5]}"
    elif edit == "look":
        what = LOOK_NAMES[choice(rng, [name for name in LOOKS if name != look])]
    elif edit == "remove" or rng.uniform() < 0.5:
        edit = choice(rng, [other for other in OBJECT_EDITS if other != edit])
    return write_sentence(rng, edit, words | {"new": colours[5], "what": what})


def _draw_rgb(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.clip(np.array(RGB[colour]) + rng.uniform(-RGB_JITTER, RGB_JITTER, 3), 0, 1)


def _tell_apart(body: Body, other: Body) -> str | None:
    """Returns the word of PICKS that tells the body from the other one in the first frame; None if they are too near to one another there."""
    (x, y, radius, _), (other_x, other_y, other_radius, _) = body.track[0], other.track[0]
    across, down, ratio = x - other_x, y - other_y, radius / other_radius
    if np.hypot(across, down) < MIN_GAP * (radius + other_radius) / 2:
        return None
    if not 1 / MIN_RATIO < ratio < MIN_RATIO:
        return "larger" if ratio > 1 else "smaller"
    if abs(across) > abs(down):
        return "left" if across < 0 else "right"
    return "upper" if down < 0 else "lower"


def _compose(backdrop: np.ndarray, bodies: Sequence[Body | None], covers: list[np.ndarray]) -> np.ndarray:
    """Draws the bodies that are there from back to front -> (F, H, W, 3) float32 in 0..1; exact where the coverage is 0 or 1."""
    frames = backdrop.astype(np.float32)
    for body, cover in zip(bodies, covers):
        if body is not None:
            frames = (1 - cover[..., None]) * frames + cover[..., None] * _paint(body, cover.shape)
    return np.clip(frames, 0, 1)


def _paint(body: Body, shape: tuple[int, ...]) -> np.ndarray:
    """(F, H, W, 3): the body's colour, lighter on one of its sides; the shading turns with it."""
    x, y, radius, angle = (column[:, None, None] for column in body.track.T)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    along = ((columns - x) * np.cos(angle + body.light) + (rows - y) * np.sin(angle + body.light)) / radius
    return np.clip(body.rgb * (1 + SHADE * np.clip(along, -1, 1)[..., None]), 0, 1).astype(np.float32)


def _is_visible(source: np.ndarray, target: np.ndarray, mask: np.ndarray, late: bool) -> bool:
    """Whether enough pixels of the mask change visibly, in the clip and in the first frame (none there, if the object enters late)."""
    changed = np.linalg.norm(target - source, axis=-1) > VISIBLE
    first = changed[0].mean()
    return changed.sum() >= MIN_VISIBLE * mask.sum() and (not mask[0].any() if late else first >= 2 * MIN_CHANGED)
