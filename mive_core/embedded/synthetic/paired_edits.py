"""Paired edits: source, target, reference, instruction and mask, rendered from one plan."""

from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch

from ...errors import UserError
from ...types import Clip, EditRequest, PairedEdit
from .edit_plan import Plan, draw_plan, plan_odds
from .edit_scenes import EditScenes, draw_edit_scenes
from .labels import NONE, PLACES, EditLabels
from .phrasing import instruct
from .random_scenes import clip_times
from .scene import TIME_UNIT, compose, render_body, visible

SPLITS = ("train", "heldout")
MAX_ATTEMPTS = 12
MIN_AREA = 0.025  # of a square of the shorter side, that a local edit must change
SETTLED = 0.7  # seconds after which what comes in late must be seen


@dataclass(frozen=True)
class EditedObject:
    """The single body that an edit is about."""

    track: torch.Tensor  # (F, 3) its centre's x and y and its radius, in pixels
    shape: str  # after the edit, NONE where it was removed
    cover: torch.Tensor  # (F, H, W) in 0..1, how much of it shows in the target


@dataclass(frozen=True)
class SyntheticEdit:
    """A paired edit and what it is about."""

    pair: PairedEdit
    labels: EditLabels
    thing: EditedObject | None = None  # of a look or a background there is none


@dataclass(frozen=True)
class Rendered:
    source: np.ndarray  # (F, H, W, 3)
    target: np.ndarray  # (F, H, W, 3)
    footprint: np.ndarray  # (F, H, W) 0..1, how much of each pixel the edit touches
    cover: np.ndarray | None = None  # (F, H, W) 0..1, how much of each pixel the edited body covers in the target


class PairedEdits:
    """An endless set of paired edits; an index always gives the same one, in every process.

    size is (width, height), multiples of 16; num_frames is 4n+1 and lasts half a second or more. kinds and edits restrict what is drawn.
    Raises UserError for a split, size, length, kind or edit that does not exist.
    """

    def __init__(
        self,
        seed: int,
        split: str = "train",
        size: tuple[int, int] = (96, 96),
        num_frames: int = 17,
        fps: float = 8.0,
        kinds: tuple[str, ...] | None = None,
        edits: tuple[str, ...] | None = None,
    ):
        if split not in SPLITS:
            raise UserError("unknown split", got=repr(split), expected=" or ".join(SPLITS))
        if any(n % 16 or n < 32 for n in size):
            raise UserError("the clips' size does not fit", got=f"{size[0]}x{size[1]}", expected="multiples of 16, at least 32")
        if num_frames % 4 != 1 or num_frames - 1 < 0.5 * fps:
            raise UserError("the clips' length does not fit", got=f"{num_frames} frames at {fps} a second", expected="4n+1 frames, at least half a second")
        self.seed, self.split, self.size, self.num_frames, self.fps = seed, split, size, num_frames, fps
        self.odds = plan_odds(split, kinds, edits)

    def sample(self, index: int) -> SyntheticEdit:
        """The edit of that index, any integer >= 0."""
        held_out = self.split == "heldout"
        rng = np.random.default_rng((self.seed, crc32(self.split.encode()), index))
        times = clip_times(self.num_frames, self.fps)
        visible_cast = None
        while visible_cast is None:
            plan = draw_plan(rng, self.odds, held_out)
            visible_cast = draw_visible(rng, plan, times, self.size)
        cast, rendered = visible_cast
        instruction = instruct(rng, plan, cast, _tracks(cast, times, self.size), held_out)
        source, target = torch.from_numpy(rendered.source), torch.from_numpy(rendered.target)
        seen = target if plan.reference_tells or plan.late else source
        mask = torch.from_numpy(dilate(rendered.footprint > 0))
        request = EditRequest(Clip(source, self.fps), seen[0].clone(), instruction)
        labels = replace(plan.labels, place=place_of(plan, rendered.footprint))
        body = cast.after or cast.before
        pair = PairedEdit(request, target, mask, f"{self.split}-{self.seed}-{index}", body and body.rgb)
        if body is None:
            return SyntheticEdit(pair, labels)
        track = torch.from_numpy(body.motion.track(times, self.size)[:, :3].astype(np.float32))
        return SyntheticEdit(pair, labels, EditedObject(track, labels.new_shape, torch.from_numpy(rendered.cover)))

    def say(self, index: int) -> tuple[str, EditLabels]:
        """An instruction and what it asks for, with nothing rendered; `place` is there only where the instruction names it."""
        held_out = self.split == "heldout"
        rng = np.random.default_rng((self.seed, crc32(self.split.encode()), index, 1))
        plan = draw_plan(rng, self.odds, held_out)
        times = clip_times(self.num_frames, self.fps)
        cast = draw_edit_scenes(rng, plan, self.size, float(times[-1]))
        return instruct(rng, plan, cast, _tracks(cast, times, self.size), held_out), replace(plan.labels, place=cast.where)


def draw_visible(rng: np.random.Generator, plan: Plan, times: np.ndarray, size: tuple[int, int]) -> tuple[EditScenes, Rendered] | None:
    """Draw until the edit can be seen; None where a plan does not fit the frame, as a few do not."""
    for _ in range(MAX_ATTEMPTS):
        cast = draw_edit_scenes(rng, plan, size, float(times[-1]))
        rendered = render_edit_scenes(cast, times, size)
        if shows(plan, rendered.footprint, times):
            return cast, rendered
    return None


def render_edit_scenes(cast: EditScenes, times: np.ndarray, size: tuple[int, int]) -> Rendered:
    """Both clips of a cast from the same layers, so that what is not edited is equal bit for bit."""
    others = [render_body(body, times, size) for body in cast.others]
    shape = (len(times), size[1], size[0])
    stacks, footprint = [], np.zeros(shape, np.float32)
    for body in (cast.before, cast.after):
        layers, cover = list(others), np.zeros(shape, np.float32)
        if body is not None:
            layers.insert(cast.depth, render_body(body, times, size))
            cover = visible(layers, cast.depth, shape)
            footprint = np.maximum(footprint, cover)
        stacks.append(layers)
    backdrop = cast.backdrop.render(times, size)
    new_backdrop = backdrop
    if cast.new_backdrop is not cast.backdrop:
        new_backdrop = cast.new_backdrop.render(times, size)
        footprint = uncovered(others, shape)
    source = compose(backdrop, stacks[0])
    if cast.look is not None:
        return Rendered(source, cast.look(source), np.ones(shape, np.float32))
    return Rendered(source, compose(new_backdrop, stacks[1]), footprint, cover)


def uncovered(layers: list, shape: tuple[int, int, int]) -> np.ndarray:
    """What all layers leave of the background: (F, H, W) in 0..1."""
    left = np.ones(shape, np.float32)
    for layer in layers:
        rows, columns = layer.box
        left[:, rows, columns] *= 1 - layer.cover
    return left


def shows(plan: Plan, footprint: np.ndarray, times: np.ndarray) -> bool:
    """Whether enough of the edit can be seen, and, of what comes late, nothing in frame 0."""
    # of a square of the frame's shorter side, which is what bodies are measured by
    areas = (footprint > 0.5).sum(axis=(1, 2)) / min(footprint.shape[1:]) ** 2
    if plan.late:
        settled = areas[times * TIME_UNIT >= min(SETTLED, times[-1] * TIME_UNIT)]
        return not (footprint[0] > 0).any() and bool(settled.min() >= 0.6 * MIN_AREA and settled.mean() >= MIN_AREA)
    return bool(areas[0] >= MIN_AREA and areas.min() >= 0.4 * MIN_AREA and areas.mean() >= MIN_AREA)


def place_of(plan: Plan, footprint: np.ndarray) -> str:
    """The cell of a 3 x 3 grid in which the edit's centre lies, over all frames."""
    if plan.labels.edit in ("look", "background"):
        return NONE
    weight = footprint.sum(axis=0)
    height, width = weight.shape
    x = float((weight.sum(axis=0) * (np.arange(width) + 0.5)).sum() / weight.sum() / width)
    y = float((weight.sum(axis=1) * (np.arange(height) + 0.5)).sum() / weight.sum() / height)
    return PLACES[1 + min(int(y * 3), 2) * 3 + min(int(x * 3), 2)]


def dilate(mask: np.ndarray) -> np.ndarray:
    """One pixel in each direction: (F, H, W) bool -> (F, H, W) bool."""
    rows = mask.copy()
    rows[:, 1:] |= mask[:, :-1]
    rows[:, :-1] |= mask[:, 1:]
    out = rows.copy()
    out[:, :, 1:] |= rows[:, :, :-1]
    out[:, :, :-1] |= rows[:, :, 1:]
    return out


def _tracks(cast: EditScenes, times: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    edited = cast.before or cast.after
    return [] if edited is None else [body.motion.track(times, size) for body in (edited, *cast.others)]
