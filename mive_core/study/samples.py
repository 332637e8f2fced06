"""What a small Wan draws from captions, as one picture: a caption over frames of each clip."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..config import latent_grid
from ..embedded.vae_network import decode_clips, read_whole_clip_vae
from ..evaluation.contact_sheet import GAP, INK, MARGIN, PAPER
from ..media.paths import atomic_write
from ..pipeline import EMBEDDED
from .captioned_clips import NUM_FRAMES, SIZE, TextEncoder
from .small_wan import load_wan, sample

CAPTIONS = (
    "a large red star on the left moves to the right, over a plain gray surface",
    "a large blue circle at the top moves down, over green grass",
    "a yellow square in the middle rests, over a brick wall",
    "a large white cross on the right moves to the left, over a gradient from dark to gray",
    "a large green ring at the bottom moves up, over a cat",
    "a pink triangle in the upper left moves down and to the right, over a plain dark surface",
)
NUM_COLUMNS, TITLE_HEIGHT = 5, 22
STEPS, CFG = 20, 4.0


@torch.inference_mode()
def write_samples(wan: Path, path: Path, captions: tuple[str, ...] = CAPTIONS) -> None:
    """Draws the captions with the small Wan in diffusers' folder `wan` and writes a PNG."""
    tiny = EMBEDDED["tiny"]
    states = TextEncoder(tiny / "vlm")(captions)
    latents = sample(load_wan(wan), states, grid=latent_grid(NUM_FRAMES, SIZE[1], SIZE[0]), cfg=CFG, steps=STEPS)
    clips = decode_clips(read_whole_clip_vae(tiny / "vae.safetensors"), latents)
    columns = np.linspace(0, NUM_FRAMES - 1, NUM_COLUMNS).round().astype(int)
    width, step = SIZE[0], TITLE_HEIGHT + SIZE[1] + GAP
    picture = Image.new("RGB", (2 * MARGIN + NUM_COLUMNS * (width + GAP), 2 * MARGIN + len(captions) * step), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for row, (caption, frames) in enumerate(zip(captions, clips)):
        top = MARGIN + row * step
        draw.text((MARGIN, top + 4), caption, INK, font)
        for column, frame in enumerate(frames[columns]):
            cell = Image.fromarray((frame * 255).round().byte().numpy())
            picture.paste(cell, (MARGIN + column * (width + GAP), top + TITLE_HEIGHT))
    with atomic_write(path) as partial:
        picture.save(partial, "PNG", optimize=True)
