"""Draws the layers' affinities: a heat map over the image for each layer, and the attention mask ratio by layer.

H x W pixels, Y x X tokens of the image.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .layer_affinity import LayerAffinities, LayerAffinity
from .loss_curve import INK, LEVEL, PAPER, RULE, axis_ticks

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 460), 92, 36, 64, 64
FONT = 22  # points; a node shows the picture at a third of its width
LINEAR = (96, 120, 190)
COLD, WARM, HOT = (24, 20, 60), (214, 62, 72), (255, 236, 130)  # of a token with nothing, half of the most, the most
VISIBLE = 0.62  # share of the heat in the picture's colours
SMALLEST = 384  # pixels of the longer side: smaller images are enlarged, so that the label can be read


def draw_heat_map(image: Tensor, row: LayerAffinity) -> Tensor:
    """image (H, W, 3) in 0..1 -> (H, W, 3): the layer's map over the image in gray, with its number. Each map has its own scale, from 0 to its most.

    A small image is enlarged to a longer side of at least 384 pixels, without smoothing.
    """
    factor = max(1, -(-SMALLEST // max(image.shape[:2])))
    image = image.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    height, width = image.shape[:2]
    heat = F.interpolate((row.map / row.map.max())[None, None], (height, width), mode="bilinear")[0, 0, :, :, None]
    cold, warm, hot = (torch.tensor(colour) / 255 for colour in (COLD, WARM, HOT))
    colours = torch.where(heat < 0.5, torch.lerp(cold, warm, 2 * heat), torch.lerp(warm, hot, 2 * heat - 1))
    gray = (image @ torch.tensor([0.299, 0.587, 0.114]))[:, :, None]
    picture = Image.fromarray((torch.lerp(gray.expand(-1, -1, 3), colours, VISIBLE).clamp(0, 1) * 255).round().byte().numpy())
    draw, size = ImageDraw.Draw(picture), max(16, min(height, width) // 12)
    text = f"layer {row.layer}" + ("" if row.ratio is None else f"   {row.ratio:.3f}")
    draw.text((size // 2, size // 2), text, (255, 255, 255), ImageFont.load_default(size), stroke_width=max(1, size // 10), stroke_fill=(0, 0, 0))
    return torch.from_numpy(np.array(picture)).float() / 255


def draw_layers(affinities: LayerAffinities) -> Image.Image:
    """Draws the attention mask ratio by layer, in both normalisations, beside the mask's share; without a mask the share in a tenth of the image."""
    rows, share = affinities.layers, affinities.mask_share
    curves: list[tuple[str, tuple[int, int, int], list[float]]]
    if share is None:
        title, level = "share of the affinity in a tenth of the image, by layer", (0.1, "equal everywhere")
        curves = [("", INK, [row.top_share for row in rows])]
    else:
        title, level = "attention mask ratio by layer", (share, "the mask's share of the image")
        curves = [("linear", LINEAR, [row.linear_ratio or 0.0 for row in rows]), ("softmax", INK, [row.ratio or 0.0 for row in rows])]
    picture = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT)
    ticks = axis_ticks([0.0, level[0], *(value for _, _, values in curves for value in values)])
    right, bottom, last = SIZE[0] - RIGHT, SIZE[1] - BOTTOM, max(len(rows) - 1, 1)

    def to_pixel(index: float, value: float) -> tuple[float, float]:
        return LEFT + index / last * (right - LEFT), bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - TOP)

    draw.text((LEFT, TOP - 24), f"{title}, {affinities.vlm}", INK, font, anchor="ls")
    for tick in ticks:
        y = to_pixel(0, tick)[1]
        draw.line((LEFT, y, right, y), RULE)
        draw.text((LEFT - 8, y), f"{tick:.4g}", INK, font, anchor="rm")
    y = to_pixel(0, level[0])[1]
    for left in range(LEFT, right, 18):
        draw.line((left, y, min(left + 9, right), y), LEVEL, 2)
    for _, colour, values in curves:
        points = [to_pixel(index, value) for index, value in enumerate(values)]
        if len(points) > 1:
            draw.line(points, colour, 3)
        for x, y in points:
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), colour)
    for index in range(0, len(rows), 1 + (len(rows) - 1) // 18):
        draw.text((to_pixel(index, 0)[0], bottom + 8), str(rows[index].layer), INK, font, anchor="mt")
    x = float(LEFT)
    for text, colour in [(name, colour) for name, colour, _ in reversed(curves) if name] + [(f"- - {level[1]}", LEVEL)]:
        draw.text((x, SIZE[1] - 8), text, colour, font, anchor="ls")
        x += draw.textlength(text, font) + 2 * FONT
    return picture
