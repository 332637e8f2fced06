"""What MiVE Encode has read, kept in the CONDITIONING as small pictures, and whether MiVE Reference Latents encodes the same.

Both nodes fit clip and reference by themselves, so the pictures are compared after that, whatever the sizes.
"""

from dataclasses import dataclass

from torch import Tensor

from ...mive_core.errors import UserError
from ...mive_core.media.fit import SAME_SHAPE, resize, resize_and_crop, stretch_of
from ...mive_core.types import EditRequest

READ = "mive_read"  # key in a CONDITIONING's dict
SIDE = 16  # of a picture, in pixels
SAME_PLACE, SAME_CROP = 0.1, 0.08  # largest difference of a pixel, and mean difference where one picture was cropped, up to which two are the same


@dataclass(frozen=True)
class Picture:
    """An image, reduced to what tells it from another one."""

    pixels: Tensor  # (SIDE, SIDE, 3): the whole image
    size: tuple[int, int]  # of the image: width, height

    @classmethod
    def of(cls, image: Tensor) -> "Picture":
        """(H, W, 3) -> the picture, on the CPU."""
        return cls(resize(image.float().cpu(), (SIDE, SIDE)), (image.shape[1], image.shape[0]))

    def cropped(self, size: tuple[int, int]) -> Tensor:
        """(SIDE, SIDE, 3): cropped at the centre to the shape of `size`, as the image itself would be."""
        width, height = self.size
        enlarged = resize(self.pixels, (round(8 * SIDE * min(1.0, width / height)), round(8 * SIDE * min(1.0, height / width))))
        larger, smaller = max(size), min(size)
        sides = (8 * SIDE, round(8 * SIDE * smaller / larger))
        return resize(resize_and_crop(enlarged[None], sides if size[0] >= size[1] else sides[::-1])[0], (SIDE, SIDE))


@dataclass(frozen=True)
class ReadClip:
    """A clip as the VLM has read it."""

    num_frames: int
    source: Picture  # the first frame
    reference: Picture

    @classmethod
    def of(cls, request: EditRequest) -> "ReadClip":
        frames = request.source.frames
        return cls(len(frames), Picture.of(frames[0]), Picture.of(request.reference))


def check_agreement(conditioning: list, frames: Tensor, reference: Tensor, where: str) -> None:
    """A CONDITIONING against the clip to edit, (F, H, W, 3), and its reference (H, W, 3). Raises UserError if it was made for others."""
    pictures = {"source": Picture.of(frames[0]), "reference": Picture.of(reference)}
    for read in (values[READ] for _, values in conditioning if READ in values):
        if read.num_frames != len(frames):
            raise UserError(
                "MiVE Encode has read another number of frames than are to be edited",
                where=where,
                got=f"{read.num_frames} read, {len(frames)} to edit",
                expected="the same number",
                fix="connect the video of MiVE Preflight to both nodes, and its length or 0 to this one",
            )
        for what, now in pictures.items():
            difference = compare(getattr(read, what), now)
            if difference is not None:
                raise UserError(
                    f"MiVE Encode has read another {what}",
                    where=where,
                    got=f"pictures that differ by {difference:.0%}",
                    expected="the same",
                    fix=f"connect the same {what} to both nodes",
                )


def check_order(source: Tensor, reference: Tensor) -> None:
    """Raises UserError for one frame as the source and many as the reference."""
    if len(source) == 1 and reference.ndim == 4 and len(reference) > 1:
        raise UserError(
            "source and reference look swapped",
            got=f"a source of 1 frame, {len(reference)} references",
            expected="the video as source, one image as reference",
            fix="connect them the other way round",
        )


def compare(before: Picture, now: Picture) -> float | None:
    """By how much two pictures differ, in 0..1; None if they show one image, scaled and perhaps cropped at the centre."""
    same_shape = stretch_of((1, *before.size[::-1]), now.size) <= SAME_SHAPE
    pixels = before.pixels if same_shape else before.cropped(now.size)
    found = (pixels - now.pixels).abs().amax(dim=-1)
    difference, tolerance = (found.max(), SAME_PLACE) if same_shape else (found.mean(), SAME_CROP)
    return None if difference <= tolerance else float(difference)
