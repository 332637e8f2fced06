"""Reads a pair's target and mask frame by frame beside the source: at its rate, of its length and shape.

Rate: where two files differ in it, the frame that is on screen at the time of each of the source's frames is taken. Folders of frames
have no rate of their own: their frames belong to the source's one by one. The last frame of another rate may be missing.
Length: the source's and the other's may differ by less than 4 frames of the source, which trimming to 4n+1 frames removes.
Shape: the ratios of width to height may differ by 3 %, as 1920x1080 and 832x480 do; each picture is then cropped at its centre.
F frames, H x W pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..media.fit import stretch_of, valid_num_frames
from ..media.video import read_clip, read_fps, read_num_frames

MAX_TRIMMED = 4  # trimming a clip to 4n+1 frames removes fewer frames than this
SAME_RATE = 0.01  # relative difference of two rates that count as one, such as 23.976 and 24
MAX_STRETCH = 1.03  # of one picture's shape against the other's


@dataclass(frozen=True)
class Pace:
    """Rate, length and shape of a source."""

    count: int  # frames of the source that are used
    is_whole: bool  # whether that is all of it, but for what trimming to 4n+1 removes
    num_frames: int | None  # of the whole source, if it is known
    rate: float  # frames a second of a file, 0 for a folder of frames
    size: tuple[int, int]  # width and height

    @classmethod
    def of(cls, source: Path, fps: float, count: int, asked: int | None, size: tuple[int, int]) -> "Pace":
        """`count` frames of the source are used, `asked` is how many were asked for, None for all."""
        return cls(count, asked is None, read_num_frames(source), read_fps(source, 0.0), size)

    def read(self, path: Path, what: str, name: str, may_be_still: bool = False) -> Tensor:
        """Reads the frames beside the source's -> (count, H, W, 3), or (1, H, W, 3) of a still. Raises UserError if the two do not belong together."""
        where = f"{what} {name!r}"
        own = read_fps(path, 0.0)
        ratio = own / self.rate if own and self.rate else 1.0
        step = 1.0 if abs(ratio - 1) < SAME_RATE else ratio
        indices = (torch.arange(self.count) * step + 1e-6).long()
        needed = int(indices[-1]) + 1
        clip = read_clip(path, what=what, num_frames=needed + MAX_TRIMMED if self.is_whole and step == 1 else needed)
        self._check_shape(clip.frames, where)
        length = len(clip.frames)
        if may_be_still and length == 1:
            return clip.frames
        total = read_num_frames(path)
        if step != 1:
            self._check_time(total, own, what, where)
        missing = needed - length - (step != 1)  # at another rate the last frame may end a little before the source's
        if missing > 0 or (step == 1 and self.is_whole and valid_num_frames(length) != self.count):
            raise self._other_length(what, where, f"{length} frames", f"{needed}", missing > 0)
        if step == 1 and total and self.num_frames and abs(total - self.num_frames) >= MAX_TRIMMED:
            raise self._other_length(what, where, f"{total} frames", f"{self.num_frames}", total < self.num_frames)
        return clip.frames[indices.clamp(max=length - 1)]

    def _check_time(self, total: int | None, own: float, what: str, where: str) -> None:
        """Raises UserError unless two files of different rates last equally long, as far as that is known."""
        if not total or not self.num_frames:
            return
        seconds, expected = total / own, self.num_frames / self.rate
        if abs(seconds - expected) * self.rate >= MAX_TRIMMED:
            got, wanted = f"{total} frames at {own:.4g} a second, {seconds:.3g} s", f"{expected:.3g} s at {self.rate:.4g}"
            fix = " (if their frames belong together one by one, store both at one rate)" if total == self.num_frames else ""
            raise self._other_length(what, where, got, wanted + fix, seconds < expected)

    def _check_shape(self, frames: Tensor, where: str) -> None:
        if stretch_of(frames.shape, self.size) > MAX_STRETCH:
            height, width = frames.shape[1:3]
            raise UserError("its shape is not the source's", where=where, got=f"{width}x{height}", expected=f"the shape of {self.size[0]}x{self.size[1]}")

    def _other_length(self, what: str, where: str, got: str, expected: str, is_shorter: bool) -> UserError:
        return UserError(f"the {what} is {'shorter' if is_shorter else 'longer'} than the source", where=where, got=got, expected=expected)
