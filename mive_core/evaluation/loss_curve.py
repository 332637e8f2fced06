"""Loss curves of training runs: reads, summarises and draws the losses of a log."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, RULE, FAINT = (250, 250, 248), (28, 28, 32), (222, 222, 218), (176, 186, 206)
SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 420), 92, 36, 56, 48
LEVEL, DASH = (196, 96, 40), 9
FONT = 22  # points; a node shows the picture at a third of its width
NUM_PARTS = 10  # the running mean covers 1/NUM_PARTS of the steps


def read_losses(log: Path) -> dict[int, float]:
    """Returns step -> loss of a run's log.jsonl. A repeated step counts with its last value; a line cut off by a crash is ignored."""
    losses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            losses[int(values["step"])] = float(values["loss"])
        except (ValueError, KeyError, TypeError):  # cut off, or without a loss
            continue
    return dict(sorted(losses.items()))


def first_and_last_mean(losses: dict[int, float]) -> tuple[float, float]:
    """Mean loss of the first and of the last 1/NUM_PARTS of the steps."""
    values = list(losses.values())
    count = max(len(values) // NUM_PARTS, 1)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def draw_losses(losses: dict[int, float], label: str = "loss", levels: Mapping[str, float] | None = None) -> Image.Image:
    """Draws each value as a dot, and the running mean as a line; the axis spans the values.

    `label` names the values; `levels` are named values to compare with, such as a ceiling, drawn as dashed lines. Raises ValueError if
    there are no losses.
    """
    if not losses:
        raise ValueError("no losses to draw")
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    width, levels = max(len(values) // NUM_PARTS, 1), levels or {}
    means = running_mean(values, width)
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    ticks = axis_ticks([*values[np.isfinite(values)], *levels.values()])
    low, high = ticks[0], ticks[-1]
    right, bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM

    def to_pixel(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (right - LEFT)
        return x, bottom - (value - low) / (high - low) * (bottom - TOP)

    draw.text((LEFT, TOP - 18), f"{label} by step" + (f", and its mean over {width}" if width > 1 else ""), INK, font, anchor="ls")
    for tick in ticks:
        y = to_pixel(steps[0], tick)[1]
        draw.line((LEFT, y, right, y), RULE)
        draw.text((LEFT - 8, y), f"{tick:.4g}", INK, font, anchor="rm")
    for name, value in levels.items():
        y = to_pixel(steps[0], value)[1]
        for left in range(LEFT, right, 2 * DASH):
            draw.line((left, y, min(left + DASH, right), y), LEVEL, 2)
        draw.text((right, y - 3), name, LEVEL, font, anchor="rs")
    for step in sorted({steps[0], (steps[0] + steps[-1]) // 2, steps[-1]}):
        draw.text((to_pixel(step, low)[0], bottom + 8), str(step + 1), INK, font, anchor="mt")
    for step, value in zip(steps, values):
        if math.isfinite(value):
            x, y = to_pixel(step, value)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), FAINT)
    points = [to_pixel(step, mean) for step, mean in zip(steps, means) if math.isfinite(mean)]
    if len(points) > 1:
        draw.line(points, INK, 3)
    return picture


def axis_ticks(values: Sequence[float]) -> list[float]:
    """Returns two to six round numbers, equally spaced, the first at or below all values and the last at or above them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = high - low or abs(high) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    spacing = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if span / (unit * factor) <= 4)
    first = math.floor(low / spacing + 1e-9)
    last = max(math.ceil(high / spacing - 1e-9), first + 1)
    return [number * spacing for number in range(first, last + 1)]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, over fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    firsts = np.maximum(np.arange(len(values)) - width + 1, 0)
    lasts = np.arange(1, len(values) + 1)
    return (sums[lasts] - sums[firsts]) / (lasts - firsts)
