"""Measures how far an edit drifts from its source, frame by frame: mean colour, and change of the kept region.

F frames of H x W pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import UserError

CHANNELS = (("red", (200, 60, 50)), ("green", (50, 150, 70)), ("blue", (60, 90, 200)))
PAPER, INK, RULE = (250, 250, 248), (28, 28, 32), (222, 222, 218)
WIDTH, PLOT_HEIGHT, LEFT, RIGHT, TOP, GAP = 960, 220, 64, 24, 40, 60
MIN_RANGE = 0.02  # smallest range of a plot's axis; smaller changes are noise


@dataclass(frozen=True)
class Drift:
    """Change from source to edit, as a fraction of the full range."""

    color: Tensor  # (F, 3) mean of the edit minus mean of the source over the kept region
    kept: Tensor  # (F,) mean absolute change of the kept region; NaN for frames without one


def measure_drift(source: Tensor, edited: Tensor, mask: Tensor | None = None) -> Drift:
    """source, edited (F, H, W, 3) in 0..1, mask (F, H, W) bool, True inside the edit -> Drift.

    Without a mask the whole picture counts as kept. Raises UserError if sizes or frame counts differ.
    """
    if source.shape != edited.shape:
        raise UserError("source and edit differ", got=f"{_describe(edited)}", expected=_describe(source))
    if mask is not None and mask.shape != source.shape[:3]:
        raise UserError("the mask does not lie over the source", got=f"{len(mask)} masks of {mask.shape[2]}x{mask.shape[1]}", expected=_describe(source))
    kept = torch.ones(source.shape[:3], dtype=torch.bool) if mask is None else ~mask
    weight = kept[..., None].float()
    count = weight.sum(dim=(1, 2))  # (F, 1); a frame without kept pixels gives 0 / 0 = NaN
    change = (edited - source) * weight
    return Drift(change.sum(dim=(1, 2)) / count, change.abs().mean(dim=-1).sum(dim=(1, 2)) / count[:, 0])


def describe_drift(drift: Drift) -> str:
    """A text summary of a few lines, in levels of 255."""
    kept, color = drift.kept * 255, drift.color * 255
    known = kept[~kept.isnan()]
    if not len(known):
        return "nothing is kept: the mask covers every frame"
    colors = ", ".join(f"{name} {color[:, i].nanmean():+.1f}" for i, (name, _) in enumerate(CHANNELS))
    worst = int(torch.where(kept.isnan(), -1.0, kept).argmax())
    return (
        f"{len(kept)} frames, in levels of 255\n"
        f"kept region: changes by {known.mean():.2f} on average, most in frame {worst} ({kept[worst]:.2f})\n"
        f"colour: {colors} on average\n"
        f"from the first frame to the last: kept {kept[-1] - kept[0]:+.2f}"
    )


def draw_drift(drift: Drift) -> Image.Image:
    """Draws two plots over the frames: colour difference per channel, and change of the kept region."""
    picture = Image.new("RGB", (WIDTH, 2 * PLOT_HEIGHT + 2 * TOP + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    color, kept = drift.color.numpy() * 255, drift.kept[:, None].numpy() * 255
    _plot(draw, TOP, "mean colour, edit minus source (levels of 255)", color, [c for _, c in CHANNELS])
    _plot(draw, TOP + PLOT_HEIGHT + GAP, "mean change of the kept region (levels of 255)", kept, [INK])
    return picture


def _plot(draw: ImageDraw.ImageDraw, top: int, title: str, values: np.ndarray, colors: list[tuple[int, int, int]]) -> None:
    """Draws values (F, lines), one curve per line."""
    font = ImageFont.load_default(14)
    finite = values[np.isfinite(values)]
    low, high = min(0.0, finite.min(initial=0)), max(0.0, finite.max(initial=0))
    high = max(high, low + 255 * MIN_RANGE)
    bottom = top + PLOT_HEIGHT - 24
    draw.text((LEFT, top - 8), title, INK, font, anchor="ls")
    for level in (low, (low + high) / 2, high):
        y = bottom - (level - low) / (high - low) * (bottom - top)
        draw.line((LEFT, y, WIDTH - RIGHT, y), RULE)
        draw.text((LEFT - 8, y), f"{level:.1f}", INK, font, anchor="rm")
    last = max(len(values) - 1, 1)
    for frame in sorted({0, last // 2, len(values) - 1}):
        draw.text((LEFT + frame / last * (WIDTH - LEFT - RIGHT), bottom + 6), str(frame), INK, font, anchor="mt")
    for line, color in zip(values.T, colors):
        points = [(LEFT + i / last * (WIDTH - LEFT - RIGHT), bottom - (v - low) / (high - low) * (bottom - top)) for i, v in enumerate(line) if np.isfinite(v)]
        if len(points) > 1:
            draw.line(points, color, 2)
        for x, y in points:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), color)


def _describe(frames: Tensor) -> str:
    return f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}"
