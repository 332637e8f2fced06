"""The pairs shipped with the training workflow: crops of the sample clip before and after a look that the embedded models do not know.

python -m mive_core.embedded.sample_pairs writes them, and the clip's first frame, fitted to 96x96, with that look, to mive_core/assets/samples.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..media.fit import resize_and_crop
from ..media.video import read_clip, write_image, write_video
from ..types import Clip

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
SIDE, NUM_FRAMES, TOP = 96, 17, 8
# name -> (x, first frame, mirrored)
PARTS = {"left_mirrored": (0, 0, True), "right_mirrored": (96, 0, True), "middle_mirrored": (48, 16, True), "right": (96, 16, False)}
NEON_COLOUR = (200, 40, 160)
INSTRUCTION = "make it glow like neon"


def neon(frames: Tensor) -> Tensor:
    """Applies the look: (..., 3) in 0..1 -> each channel's distance from NEON_COLOUR."""
    return (frames - torch.tensor(NEON_COLOUR) / 255).abs()


def write(folder: Path) -> None:
    """Writes pairs, instruction and reference."""
    clip = read_clip(SAMPLES / "bigbuckbunny_33f.mp4")
    for kind in ("source", "target"):
        (folder / "pairs" / kind).mkdir(parents=True, exist_ok=True)
    for name, (left, first, mirrored) in PARTS.items():
        part = clip.frames[first : first + NUM_FRAMES, TOP : TOP + SIDE, left : left + SIDE]
        part = part.flip(2) if mirrored else part
        for kind, frames in (("source", part), ("target", neon(part))):
            write_video(folder / "pairs" / kind / f"{name}.mp4", Clip(frames.contiguous(), clip.fps))
    (folder / "pairs" / "instruction.txt").write_text(INSTRUCTION + "\n", encoding="utf-8")
    write_image(folder / "neon.png", neon(resize_and_crop(clip.frames[:1], (SIDE, SIDE))[0]))


if __name__ == "__main__":
    write(SAMPLES)
