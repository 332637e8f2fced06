"""Pairs for a first training: crops of the sample clip before and after a look.

`mive data samples` writes pairs of a look that the embedded DiT does not know (raster lines: 16.1 dB, under a ceiling of 26.0), with
held-out ones. python -m mive_core.embedded.sample_pairs writes those of the training workflow, and the clip's first frame, fitted to
96x96, with its look, to mive_core/assets/samples.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..media.fit import resize_and_crop
from ..media.images import write_image
from ..media.video import read_clip, write_video
from ..types import Clip

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
CLIP = SAMPLES / "bigbuckbunny_33f.mp4"
SIDE, NUM_FRAMES, TOP = 96, 17, 8
# name -> (x, first frame, mirrored)
PARTS = {"left_mirrored": (0, 0, True), "right_mirrored": (96, 0, True), "middle_mirrored": (48, 16, True), "right": (96, 16, False)}
HELD_OUT_PARTS = {"middle": (48, 0, False), "left": (0, 16, False)}
NEON_COLOUR = (200, 40, 160)
LINE_HEIGHT, LINE_SHADE = 8, 0.35


def neon(frames: Tensor) -> Tensor:
    """Applies the look: (..., 3) in 0..1 -> each channel's distance from NEON_COLOUR."""
    return (frames - torch.tensor(NEON_COLOUR) / 255).abs()


def television(frames: Tensor) -> Tensor:
    """Applies the look: (..., H, W, 3) in 0..1 -> every second line of LINE_HEIGHT pixels is darker."""
    bright = (torch.arange(frames.shape[-3]) // LINE_HEIGHT % 2).float()[:, None, None]
    return frames * (LINE_SHADE + (1 - LINE_SHADE) * bright)


LOOKS = {"make it glow like neon": neon, "make it look like an old television": television}


def write_pairs(folder: Path, parts: dict[str, tuple[int, int, bool]], instruction: str) -> None:
    """Writes a folder of pairs, source/NAME.mp4, target/NAME.mp4 and one instruction.txt; `instruction` is one of LOOKS."""
    clip = read_clip(CLIP)
    for kind in ("source", "target"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, (left, first, mirrored) in parts.items():
        part = clip.frames[first : first + NUM_FRAMES, TOP : TOP + SIDE, left : left + SIDE]
        part = part.flip(2) if mirrored else part
        for kind, frames in (("source", part), ("target", LOOKS[instruction](part))):
            write_video(folder / kind / f"{name}.mp4", Clip(frames.contiguous(), clip.fps))
    (folder / "instruction.txt").write_text(instruction + "\n", encoding="utf-8")


def write_reference(path: Path) -> None:
    """Writes the clip's first frame, fitted to 96x96, with the look."""
    write_image(path, neon(resize_and_crop(read_clip(CLIP).frames[:1], (SIDE, SIDE))[0]))


if __name__ == "__main__":
    write_pairs(SAMPLES / "pairs", PARTS, "make it glow like neon")
    write_reference(SAMPLES / "neon.png")
