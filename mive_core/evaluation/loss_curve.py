"""The loss of a training over its steps, as its log holds it: read, summed up, drawn."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, RULE, FAINT = (250, 250, 248), (28, 28, 32), (222, 222, 218), (176, 186, 206)
SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 420), 92, 36, 56, 48
FONT = 22  # of a picture that a node shows at a third of its width
PARTS = 10  # of the steps, one of which a mean runs over


def read_losses(log: Path) -> dict[int, float]:
    """Step -> loss of a run's log.jsonl. Steps that were done again count as they went last; a line cut off by a crash does not."""
    losses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            losses[int(values["step"])] = float(values["loss"])
        except (ValueError, KeyError, TypeError):  # cut off, or of another kind
            continue
    return dict(sorted(losses.items()))


def ends(losses: dict[int, float]) -> tuple[float, float]:
    """Mean loss of the first and of the last part."""
    values = list(losses.values())
    count = max(len(values) // PARTS, 1)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def draw_losses(losses: dict[int, float], what: str = "loss") -> Image.Image:
    """Each loss, or `what` else it is, as a dot, and their running mean. Raises ValueError where there is none."""
    if not losses:
        raise ValueError("no losses to draw")
    steps, values = np.array(list(losses)), np.array(list(losses.values()))
    means = running_mean(values, max(len(values) // PARTS, 1))
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    finite = values[np.isfinite(values)]
    high = max(float(finite.max(initial=0.0)), 1e-9)
    right, bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (right - LEFT), bottom - value / high * (bottom - TOP)

    draw.text((LEFT, TOP - 18), f"{what} by step, and its mean over {max(len(values) // PARTS, 1)}", INK, font, anchor="ls")
    for level in (0.0, high / 2, high):
        y = place(steps[0], level)[1]
        draw.line((LEFT, y, right, y), RULE)
        draw.text((LEFT - 8, y), f"{level:.3g}", INK, font, anchor="rm")
    for step in sorted({steps[0], (steps[0] + steps[-1]) // 2, steps[-1]}):
        draw.text((place(step, 0)[0], bottom + 8), str(step + 1), INK, font, anchor="mt")
    for step, value in zip(steps, values):
        if math.isfinite(value):
            x, y = place(step, value)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), FAINT)
    points = [place(step, mean) for step, mean in zip(steps, means) if math.isfinite(mean)]
    if len(points) > 1:
        draw.line(points, INK, 3)
    return picture


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Over the last `width` values, over fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    firsts = np.maximum(np.arange(len(values)) - width + 1, 0)
    lasts = np.arange(1, len(values) + 1)
    return (sums[lasts] - sums[firsts]) / (lasts - firsts)
