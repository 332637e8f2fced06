"""Draws what the DiT's target tokens attend to, as stacked bars by block."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .attention_share import mean_by_block
from .loss_curve import INK, PAPER, RULE

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, LEGEND = 1160, 260, 76, 24, 56, 76, 56
FONT = 22  # points
LAYERS = ((70, 60, 140), (120, 100, 200), (165, 150, 225), (205, 195, 240))  # of the condition's parts, by layer; repeated from the fifth on
REFERENCE, TARGET = (228, 150, 60), (200, 204, 198)
TITLES = {"mass": "attention mass of target tokens, by block", "weighted": "the same, times the norm of the values"}


def draw_attention(rows: Sequence[dict]) -> Image.Image:
    """The rows of rows_of -> two panels, mass and weighted, each the mean over the passes: condition (by layer), reference and target."""
    picture = Image.new("RGB", (WIDTH, TOP + 2 * PANEL + GAP + LEGEND + 34), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    named = {}
    for index, (measure, title) in enumerate(TITLES.items()):
        top = TOP + index * (PANEL + GAP)
        draw.text((LEFT, top - 14), title, INK, font, anchor="ls")
        for level in (0, 0.25, 0.5, 0.75, 1):
            y = top + PANEL * (1 - level)
            draw.line((LEFT - 4, y, WIDTH - RIGHT, y), RULE)
            draw.text((LEFT - 12, y), f"{level:g}", INK, font, anchor="rm")
        means = mean_by_block(rows, measure)
        pitch = (WIDTH - LEFT - RIGHT) / len(means)
        for block, mean in enumerate(means):
            parts = {f"condition, layer {k}": (value, LAYERS[i % len(LAYERS)]) for i, (k, value) in enumerate(mean["condition_by_layer"].items())}
            parts |= {"reference": (mean["reference"], REFERENCE), "target": (mean["target"], TARGET)}
            named = {name: colour for name, (_, colour) in parts.items()}
            left, bottom = LEFT + (block + 0.12) * pitch, float(top + PANEL)
            for value, colour in parts.values():
                draw.rectangle((left, bottom - PANEL * value, left + 0.76 * pitch, bottom), colour)
                bottom -= PANEL * value
            if block % (1 + (len(means) - 1) // 20) == 0:
                draw.text((left + 0.38 * pitch, top + PANEL + 8), str(block), INK, font, anchor="mt")
    x, y = LEFT, picture.height - LEGEND + 16
    for name, colour in named.items():
        draw.rectangle((x, y, x + FONT, y + FONT), colour)
        draw.text((x + FONT + 8, y + FONT / 2), name, INK, font, anchor="lm")
        x += FONT + 36 + int(draw.textlength(name, font))
    return picture
