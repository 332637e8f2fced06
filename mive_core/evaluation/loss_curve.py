"""Loss curves of training runs: reads, summarises and draws the losses of a log."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, RULE, FAINT = (250, 250, 248), (28, 28, 32), (222, 222, 218), (176, 186, 206)
SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 420), 92, 36, 56, 48
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


def draw_losses(losses: dict[int, float], label: str = "loss") -> Image.Image:
    """Draws each value as a dot, and the running mean as a line; `label` names the values. Raises ValueError if there are none."""
    if not losses:
        raise ValueError("no losses to draw")
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    means = running_mean(values, max(len(values) // NUM_PARTS, 1))
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    finite = values[np.isfinite(values)]
    high = max(float(finite.max(initial=0.0)), 1e-9)
    right, bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM

    def to_pixel(step: float, value: float) -> tuple[float, float]:
        return LEFT + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (right - LEFT), bottom - value / high * (bottom - TOP)

    draw.text((LEFT, TOP - 18), f"{label} by step, and its mean over {max(len(values) // NUM_PARTS, 1)}", INK, font, anchor="ls")
    for level in (0.0, high / 2, high):
        y = to_pixel(steps[0], level)[1]
        draw.line((LEFT, y, right, y), RULE)
        draw.text((LEFT - 8, y), f"{level:.3g}", INK, font, anchor="rm")
    for step in sorted({steps[0], (steps[0] + steps[-1]) // 2, steps[-1]}):
        draw.text((to_pixel(step, 0)[0], bottom + 8), str(step + 1), INK, font, anchor="mt")
    for step, value in zip(steps, values):
        if math.isfinite(value):
            x, y = to_pixel(step, value)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), FAINT)
    points = [to_pixel(step, mean) for step, mean in zip(steps, means) if math.isfinite(mean)]
    if len(points) > 1:
        draw.line(points, INK, 3)
    return picture


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values, over fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    firsts = np.maximum(np.arange(len(values)) - width + 1, 0)
    lasts = np.arange(1, len(values) + 1)
    return (sums[lasts] - sums[firsts]) / (lasts - firsts)
