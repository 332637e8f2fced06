"""Synthetic paired edits: source, target, reference, instruction and mask, rendered from one plan."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import torch

from ...errors import UserError
from ...types import Clip, EditRequest, PairedEdit
from .. import natural_clips  # a module, since it imports from here, too
from .background import Footage
from .edit_plan import Plan, draw_plan, plan_odds
from .edit_scenes import draw_edit_scenes
from .labels import NONE, EditLabels
from .phrasing import instruct
from .random_scenes import clip_times
from .rendering import ENTERED_BY_S, Rendered, dilate, is_faint, is_visible, place_of, render_shots
from .scene import TIME_UNIT
from .variation import Shot, draw_shots

REVISION = 2  # of what the training split draws: cached features of another one are out of date
SPLITS = ("train", "heldout")
MAX_ATTEMPTS = 12
MOVING_VIEWS = 0.2  # probability of moving views of pictures as the background
KEYFRAME_ODDS = (0.67, 0.25, 0.08)  # of none, one and two
AFTER_ENTRY = 0.85  # probability that the keyframes of a late object are after its entry


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
    edited_object: EditedObject | None = None  # None for looks and backgrounds, and where nothing is asked
    kind: str = NONE  # a key of KIND_ODDS["train"]; labels.kind knows fewer
    words: str = "exact"  # what the instruction tells of the edit, see Plan
    keyframes: tuple[int, ...] = ()  # frames of the target that are given beside the reference, in order, never 0; training split only
    shots: tuple[Shot, ...] = ()  # the scenes that were rendered


class PairedEdits:
    """An endless set of paired edits; an index always gives the same edit, in every process.

    size is (width, height), multiples of 16; num_frames is 4n+1 and lasts half a second or more. kinds and edits restrict the edits drawn;
    the held-out split draws the kinds of training that it lacks ("loose words" and others) only where they are named, varied as in training.
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
        shots, rendered = drawn
        scenes = shots[0].scenes
        instruction = instruct(rng, plan, scenes, _tracks(shots, self.size), held_out)
        source, target = torch.from_numpy(rendered.source), torch.from_numpy(rendered.target)
        reference_clip = target if plan.reference_shows_edit or plan.late else source
        mask = torch.from_numpy(dilate(rendered.footprint > 0))
        request = EditRequest(Clip(source, self.fps), reference_clip[0].clone(), instruction)
        labels = replace(plan.labels, place=place_of(plan, rendered.footprint))
        keyframes = () if held_out else draw_keyframes(rng, plan, times)
        bodies = [body for shot in shots if (body := shot.scenes.after or shot.scenes.before)]
        pair = PairedEdit(request, target, mask, f"{self.split}-{self.seed}-{index}", bodies[0].rgb if bodies else None)
        edited = None
        if bodies:
            track = np.concatenate([body.motion.track(shot.times, self.size) for body, shot in zip(bodies, shots)])
            edited = EditedObject(torch.from_numpy(track[:, :3].astype(np.float32)), labels.new_shape, torch.from_numpy(rendered.cover))
        return SyntheticEdit(pair, labels, edited, plan.kind, plan.words, keyframes, tuple(shots))

    def sample_instruction(self, index: int) -> tuple[str, EditLabels]:
        """Returns an instruction and its labels without rendering the clips; `place` is given only if the instruction names it."""
        held_out = self.split == "heldout"
        rng = np.random.default_rng((self.seed, crc32(self.split.encode()), index, 1))
        plan = draw_plan(rng, self.odds, held_out)
        times = clip_times(self.num_frames, self.fps)
        scenes = draw_edit_scenes(rng, plan, self.size, float(times[-1]))
        return instruct(rng, plan, scenes, _tracks([Shot(scenes, times)], self.size), held_out), replace(plan.labels, place=scenes.named_place)


def draw_visible(
    rng: np.random.Generator, plan: Plan, times: np.ndarray, size: tuple[int, int], footage: Footage | None = None
) -> tuple[list[Shot], Rendered] | None:
    """Draws scenes until the edit is visible; returns None after MAX_ATTEMPTS, as a few plans do not fit the frame."""
    if footage is None and plan.varied and rng.uniform() < MOVING_VIEWS:
        footage = Footage(natural_clips.natural_clip(int(rng.integers(2**31)), size, len(times)))
    for _ in range(MAX_ATTEMPTS):
        shots = draw_shots(rng, plan, times, size, footage)
        rendered = render_shots(shots, size)
        if is_visible(plan, rendered.footprint, times) and not (plan.varied and is_faint(plan, rendered)):
            return shots, rendered
    return None


def draw_keyframes(rng: np.random.Generator, plan: Plan, times: np.ndarray) -> tuple[int, ...]:
    """Draws the numbers of the frames given beside the reference; those of late objects are mostly after the entry."""
    first = 1
    if plan.late and rng.uniform() < AFTER_ENTRY:
        first = min(int(np.searchsorted(times * TIME_UNIT, ENTERED_BY_S)), len(times) - 1)
    num = min(int(rng.choice(len(KEYFRAME_ODDS), p=KEYFRAME_ODDS)), len(times) - first)
    return tuple(sorted(int(i) for i in rng.choice(np.arange(first, len(times)), num, replace=False)))


def _tracks(shots: Sequence[Shot], size: tuple[int, int]) -> list[np.ndarray]:
    """Returns the trajectories, the edited body's first, then the others'; empty for edits of no body, and of a clip with a cut."""
    scenes = shots[0].scenes
    edited = scenes.before or scenes.after
    return [] if edited is None or len(shots) > 1 else [body.motion.track(shots[0].times, size) for body in (edited, *scenes.others)]
