"""Renders both clips of a paired edit and the pixels that it changes, and judges whether the edit can be seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .edit_plan import Plan
from .edit_scenes import EditScenes
from .labels import NONE, PLACES
from .scene import TIME_UNIT, Layer, compose, render_body, visible
from .variation import Shot

MIN_AREA = 0.025  # smallest area of a local edit, relative to the square of the frame's shorter side
MIN_CHANGE = 0.06  # smallest mean change of a local edit's pixels, 0..1
LOCAL_EDITS = ("recolour", "replace", "remove", "add")
ENTERED_BY_S = 0.7  # seconds after which a late object must be visible


@dataclass(frozen=True)
class Rendered:
    """Both clips of an edit and the pixels that it changes."""

    source: np.ndarray  # (F, H, W, 3)
    target: np.ndarray  # (F, H, W, 3)
    footprint: np.ndarray  # (F, H, W) in 0..1, fraction of each pixel that the edit affects
    cover: np.ndarray | None = None  # (F, H, W) in 0..1, fraction of each pixel that the edited body covers in the target


def render_shots(shots: Sequence[Shot], size: tuple[int, int]) -> Rendered:
    """Renders both clips of an edit, shot by shot."""
    parts = [render_edit_scenes(shot.scenes, shot.times, size) for shot in shots]
    if len(parts) == 1:
        return parts[0]
    source, target, footprint = (np.concatenate([getattr(part, name) for part in parts]) for name in ("source", "target", "footprint"))
    covers = [part.cover for part in parts if part.cover is not None]
    return Rendered(source, target, footprint, np.concatenate(covers) if covers else None)


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
    if plan.labels.edit == NONE:
        return True
    # relative to the square of the shorter side, since bodies are sized by that side
    areas = (footprint > 0.5).sum(axis=(1, 2)) / min(footprint.shape[1:]) ** 2
    if plan.late:
        entered = areas[times * TIME_UNIT >= min(ENTERED_BY_S, times[-1] * TIME_UNIT)]
        return not (footprint[0] > 0).any() and bool(entered.min() >= 0.6 * MIN_AREA and entered.mean() >= MIN_AREA)
    return bool(areas[0] >= MIN_AREA and areas.min() >= 0.4 * MIN_AREA and areas.mean() >= MIN_AREA)


def is_faint(plan: Plan, rendered: Rendered) -> bool:
    """Whether a local edit changes its pixels so little that it is hard to see, as over a background of the object's colour."""
    edited = rendered.footprint > 0.5
    return plan.labels.edit in LOCAL_EDITS and bool(np.abs(rendered.target[edited] - rendered.source[edited]).mean() < MIN_CHANGE)


def place_of(plan: Plan, footprint: np.ndarray) -> str:
    """Returns the cell of a 3 x 3 grid that contains the edit's centre, averaged over all frames."""
    if plan.labels.edit not in LOCAL_EDITS:
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
