"""Synthetic paired edits: source, target, reference, instruction and mask, rendered from one plan."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch

from ...errors import UserError
from ...types import Clip, EditRequest, PairedEdit
from .background import Footage
from .edit_plan import Plan, draw_plan, plan_odds
from .edit_scenes import EditScenes, draw_edit_scenes, over_footage
from .labels import NONE, PLACES, EditLabels
from .phrasing import instruct
from .random_scenes import clip_times
from .scene import TIME_UNIT, Layer, compose, render_body, visible

SPLITS = ("train", "heldout")
MAX_ATTEMPTS = 12
MIN_AREA = 0.025  # smallest area of a local edit, relative to the square of the frame's shorter side
ENTERED_BY_S = 0.7  # seconds after which a late object must be visible


@dataclass(frozen=True)
class EditedObject:
    """The object that a local edit changes."""

    track: torch.Tensor  # (F, 3) x and y of the centre and radius, in pixels
    shape: str  # after the edit; NONE if removed
    cover: torch.Tensor  # (F, H, W) in 0..1, visible coverage in the target


@dataclass(frozen=True)
class SyntheticEdit:
    """A paired edit with its labels and its edited object."""

    pair: PairedEdit
    labels: EditLabels
    edited_object: EditedObject | None = None  # None for looks and backgrounds


@dataclass(frozen=True)
class Rendered:
    """Both clips of an edit and the pixels that it changes."""

    source: np.ndarray  # (F, H, W, 3)
    target: np.ndarray  # (F, H, W, 3)
    footprint: np.ndarray  # (F, H, W) in 0..1, fraction of each pixel that the edit affects
    cover: np.ndarray | None = None  # (F, H, W) in 0..1, fraction of each pixel that the edited body covers in the target


class PairedEdits:
    """An endless set of paired edits; an index always gives the same edit, in every process.

    size is (width, height), multiples of 16; num_frames is 4n+1 and lasts half a second or more. kinds and edits restrict the edits drawn.
    `footage` gives the background of each index; without it backgrounds are drawn.
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
        footage: Callable[[int], Footage] | None = None,
    ):
        if split not in SPLITS:
            raise UserError("unknown split", got=repr(split), expected=" or ".join(SPLITS))
        if any(n % 16 or n < 32 for n in size):
            raise UserError("the clips' size does not fit", got=f"{size[0]}x{size[1]}", expected="multiples of 16, at least 32")
        if num_frames % 4 != 1 or num_frames - 1 < 0.5 * fps:
            raise UserError("the clips' length does not fit", got=f"{num_frames} frames at {fps} a second", expected="4n+1 frames, at least half a second")
        self.seed, self.split, self.size, self.num_frames, self.fps = seed, split, size, num_frames, fps
        self.odds, self.footage = plan_odds(split, kinds, edits), footage

    def sample(self, index: int) -> SyntheticEdit:
        """Returns the edit with that index, any integer >= 0."""
        held_out = self.split == "heldout"
        rng = np.random.default_rng((self.seed, crc32(self.split.encode()), index))
        times = clip_times(self.num_frames, self.fps)
        footage = self.footage(index) if self.footage else None
        drawn = None
        while drawn is None:
            plan = draw_plan(rng, self.odds, held_out)
            drawn = draw_visible(rng, plan, times, self.size, footage)
        scenes, rendered = drawn
        instruction = instruct(rng, plan, scenes, _tracks(scenes, times, self.size), held_out)
        source, target = torch.from_numpy(rendered.source), torch.from_numpy(rendered.target)
        reference_clip = target if plan.reference_shows_edit or plan.late else source
        mask = torch.from_numpy(dilate(rendered.footprint > 0))
        request = EditRequest(Clip(source, self.fps), reference_clip[0].clone(), instruction)
        labels = replace(plan.labels, place=place_of(plan, rendered.footprint))
        body = scenes.after or scenes.before
        pair = PairedEdit(request, target, mask, f"{self.split}-{self.seed}-{index}", body.rgb if body else None)
        if body is None:
            return SyntheticEdit(pair, labels)
        track = torch.from_numpy(body.motion.track(times, self.size)[:, :3].astype(np.float32))
        return SyntheticEdit(pair, labels, EditedObject(track, labels.new_shape, torch.from_numpy(rendered.cover)))

    def sample_instruction(self, index: int) -> tuple[str, EditLabels]:
        """Returns an instruction and its labels without rendering the clips; `place` is given only if the instruction names it."""
        held_out = self.split == "heldout"
        rng = np.random.default_rng((self.seed, crc32(self.split.encode()), index, 1))
        plan = draw_plan(rng, self.odds, held_out)
        times = clip_times(self.num_frames, self.fps)
        scenes = draw_edit_scenes(rng, plan, self.size, float(times[-1]))
        return instruct(rng, plan, scenes, _tracks(scenes, times, self.size), held_out), replace(plan.labels, place=scenes.named_place)


def draw_visible(
    rng: np.random.Generator, plan: Plan, times: np.ndarray, size: tuple[int, int], footage: Footage | None = None
) -> tuple[EditScenes, Rendered] | None:
    """Draws scenes until the edit is visible; returns None after MAX_ATTEMPTS, as a few plans do not fit the frame."""
    for _ in range(MAX_ATTEMPTS):
        scenes = draw_edit_scenes(rng, plan, size, float(times[-1]))
        scenes = scenes if footage is None else over_footage(scenes, footage)
        rendered = render_edit_scenes(scenes, times, size)
        if is_visible(plan, rendered.footprint, times):
            return scenes, rendered
    return None


def render_edit_scenes(scenes: EditScenes, times: np.ndarray, size: tuple[int, int]) -> Rendered:
    """Renders both clips from the same layers, so that unedited pixels are equal bit for bit."""
    others = [render_body(body, times, size) for body in scenes.others]
    shape = (len(times), size[1], size[0])
    stacks, footprint = [], np.zeros(shape, np.float32)
    for body in (scenes.before, scenes.after):
        layers, cover = list(others), np.zeros(shape, np.float32)
        if body is not None:
            layers.insert(scenes.depth, render_body(body, times, size))
            cover = visible(layers, scenes.depth, shape)
            footprint = np.maximum(footprint, cover)
        stacks.append(layers)
    backdrop = scenes.backdrop.render(times, size)
    new_backdrop = backdrop
    if scenes.new_backdrop is not scenes.backdrop:
        new_backdrop = scenes.new_backdrop.render(times, size)
        footprint = uncovered(others, shape)
    source = compose(backdrop, stacks[0])
    if scenes.look is not None:
        return Rendered(source, scenes.look(source), np.ones(shape, np.float32))
    return Rendered(source, compose(new_backdrop, stacks[1]), footprint, cover)


def uncovered(layers: list[Layer], shape: tuple[int, int, int]) -> np.ndarray:
    """Returns the visible fraction of the background, (F, H, W) in 0..1."""
    remaining = np.ones(shape, np.float32)
    for layer in layers:
        rows, columns = layer.box
        remaining[:, rows, columns] *= 1 - layer.cover
    return remaining


def is_visible(plan: Plan, footprint: np.ndarray, times: np.ndarray) -> bool:
    """Whether enough of the edit is visible and, for late objects, nothing of it in frame 0."""
    # relative to the square of the shorter side, since bodies are sized by that side
    areas = (footprint > 0.5).sum(axis=(1, 2)) / min(footprint.shape[1:]) ** 2
    if plan.late:
        entered = areas[times * TIME_UNIT >= min(ENTERED_BY_S, times[-1] * TIME_UNIT)]
        return not (footprint[0] > 0).any() and bool(entered.min() >= 0.6 * MIN_AREA and entered.mean() >= MIN_AREA)
    return bool(areas[0] >= MIN_AREA and areas.min() >= 0.4 * MIN_AREA and areas.mean() >= MIN_AREA)


def place_of(plan: Plan, footprint: np.ndarray) -> str:
    """Returns the cell of a 3 x 3 grid that contains the edit's centre, averaged over all frames."""
    if plan.labels.edit in ("look", "background"):
        return NONE
    weight = footprint.sum(axis=0)
    height, width = weight.shape
    x = float((weight.sum(axis=0) * (np.arange(width) + 0.5)).sum() / weight.sum() / width)
    y = float((weight.sum(axis=1) * (np.arange(height) + 0.5)).sum() / weight.sum() / height)
    return PLACES[1 + min(int(y * 3), 2) * 3 + min(int(x * 3), 2)]


def dilate(mask: np.ndarray) -> np.ndarray:
    """Dilates a mask by one pixel in each direction: (F, H, W) bool -> (F, H, W) bool."""
    rows = mask.copy()
    rows[:, 1:] |= mask[:, :-1]
    rows[:, :-1] |= mask[:, 1:]
    out = rows.copy()
    out[:, :, 1:] |= rows[:, :, :-1]
    out[:, :, :-1] |= rows[:, :, 1:]
    return out


def _tracks(scenes: EditScenes, times: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Returns the trajectories, the edited body's first, then the others'; empty for edits of no body."""
    edited = scenes.before or scenes.after
    return [] if edited is None else [body.motion.track(times, size) for body in (edited, *scenes.others)]
