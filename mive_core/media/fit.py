"""Fits the user's pixels to the model: RGB, finite, in 0..1, of sizes that it takes.

F frames, H x W pixels. The model takes 4n+1 frames and sides that are multiples of 16
(the VAE's factors 4 and 8, and the DiT's patch of 2).
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..config import SIZE_MULTIPLE, TEMPORAL_FACTOR
from ..errors import UserError
from ..types import Clip

MIN_SIDE, MAX_SIDE = 16, 16384
SAME_SHAPE = 1.05  # ratio of two ratios of width to height up to which a picture may be scaled whole instead of cropped; edit_size keeps below
AREA_SLACK, AREA_WEIGHT = 1.07, 0.1  # of edit_size: area over the most pixels, and what less area costs beside another shape


def as_rgb(pixels: Tensor, where: str) -> Tensor:
    """(..., C) with C 1, 3 or 4 -> (..., 3): gray expanded, transparency composited over black with a warning."""
    channels = pixels.shape[-1]
    if channels == 3:
        return pixels
    if channels == 1:
        return pixels.expand(*pixels.shape[:-1], 3).contiguous()
    if channels != 4:
        raise UserError("unknown pixel layout", where=where, got=f"{channels} channels", expected="1, 3 or 4")
    color, alpha = pixels[..., :3], pixels[..., 3:]
    if (alpha < 1).any():
        warnings.warn(f"{where}: transparent pixels are composited over black", stacklevel=3)
    return color * alpha


def check_frames(frames: Tensor, where: str) -> Tensor:
    """(F, H, W, C) -> (F, H, W, 3) float32 in 0..1. Values outside 0..1 are clamped, with a warning.

    Raises UserError for 0 frames, a wrong number of axes, and NaN or infinity (with the frame's index).
    """
    if frames.ndim != 4:
        raise UserError("not a clip", where=where, got=f"shape {tuple(frames.shape)}", expected="(frames, height, width, channels)")
    if not len(frames):
        raise UserError("the clip holds 0 frames", where=where, expected="1 or more")
    check_size(frames.shape[2], frames.shape[1], where)
    frames = as_rgb(frames.float(), where)
    low, high = frames.amin(dim=(1, 2, 3)), frames.amax(dim=(1, 2, 3))  # NaN and infinity propagate
    broken = ~(low.isfinite() & high.isfinite())
    if broken.any():
        raise UserError("NaN or infinite pixels", where=where, got=f"frame {broken.nonzero()[0].item()}", expected="finite values in 0..1")
    if low.min() < 0 or high.max() > 1:
        warnings.warn(f"{where}: pixels from {low.min():.3g} to {high.max():.3g} are clamped to 0..1", stacklevel=3)
        frames = frames.clamp(0, 1)
    return frames


def check_size(width: int, height: int, where: str) -> None:
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise UserError("the picture's size is out of bounds", where=where, got=f"{width}x{height}", expected=f"sides of {MIN_SIDE} to {MAX_SIDE} px")


def check_request_size(size: tuple[int, int]) -> None:
    """Raises UserError unless the requested (width, height) are multiples of 16 within bounds."""
    width, height = size
    fit = (nearest_side(width), nearest_side(height))
    if fit != (width, height):
        raise UserError(
            "the model takes sides that are multiples of 16", where="size", got=f"{width}x{height}", expected=f"{fit[0]}x{fit[1]}, the nearest that fits"
        )


def check_request_frames(num_frames: int) -> None:
    """Raises UserError unless the requested number of frames is 4n+1."""
    if num_frames < 1 or num_frames % TEMPORAL_FACTOR != 1:
        lower = max(1, valid_num_frames(num_frames))
        raise UserError("the model takes 4n+1 frames", where="frames", got=num_frames, expected=f"{lower} or {lower + TEMPORAL_FACTOR}, the nearest that fit")


def fit_clip(clip: Clip, size: tuple[int, int] | None = None, num_frames: int | None = None, where: str = "source", max_stretch: float = 1.0) -> Clip:
    """Clip -> Clip of 4n+1 frames with sides that are multiples of 16. The pixels are checked by check_frames.

    Frames: the first `num_frames`; without it 0 to 3 frames are cut off at the end, with a warning.
    Size: (width, height); without it each side is rounded to the nearest multiple of 16, with a warning.
    Frames are scaled to cover the size and cropped at the centre, or scaled whole, see resize_and_crop.
    Raises UserError if `num_frames` or `size` does not fit, or if the clip is shorter than `num_frames`.
    """
    frames = trim_clip(clip, num_frames, where).frames
    if size is not None:
        check_request_size(size)
    else:
        width, height = frames.shape[2], frames.shape[1]
        size = (nearest_side(width), nearest_side(height))
        if size != (width, height):
            how = "scaled" if stretch_of(frames.shape, size) <= max_stretch else "scaled and cropped"
            warnings.warn(f"{where}: the model takes sides that are multiples of 16; {width}x{height} is {how} to {size[0]}x{size[1]}", stacklevel=2)
    return Clip(resize_and_crop(frames, size, max_stretch), clip.fps)


def trim_clip(clip: Clip, num_frames: int | None = None, where: str = "source") -> Clip:
    """Clip -> its first 4n+1 frames at its own size, as in `fit_clip`. The pixels are checked by check_frames. Raises UserError."""
    frames = clip.frames
    if num_frames is not None:
        check_request_frames(num_frames)
        if 0 < len(frames) < num_frames:
            raise UserError(
                "the clip is shorter than asked",
                where=where,
                got=f"{len(frames)} frames",
                expected=f"{num_frames}",
                fix=f"ask for {valid_num_frames(len(frames))} or fewer",
            )
        frames = frames[:num_frames]
    elif len(frames) and len(frames) != valid_num_frames(len(frames)):
        warnings.warn(f"{where}: the model takes 4n+1 frames; {len(frames)} are trimmed to {valid_num_frames(len(frames))}", stacklevel=3)
        frames = frames[: valid_num_frames(len(frames))]
    return Clip(check_frames(frames, where), clip.fps)


def fit_reference(
    reference: Tensor, size: tuple[int, int], where: str = "reference", source_size: tuple[int, int] | None = None, max_stretch: float = 1.0
) -> Tensor:
    """(H, W, C) -> (height, width, 3) in 0..1 for size (width, height), scaled and cropped like the source.

    `source_size` is the source's size before it was fitted, by default `size`. Warns if its aspect ratio differs by more than a tenth
    from the reference's: the two would be cropped differently and no longer align.
    Raises UserError for a batch of images, bad pixels and sides out of bounds.
    """
    if reference.ndim == 4:
        if len(reference) != 1:
            raise UserError("one reference is needed", where=where, got=f"{len(reference)} images")
        reference = reference[0]
    image = check_frames(reference[None], where)
    (width, height), shape = source_size or size, image.shape
    ratio = width / height * shape[1] / shape[2]
    if min(ratio, 1 / ratio) < 0.9:
        warnings.warn(
            f"{where}: {shape[2]}x{shape[1]} is cropped at the centre to the shape of {size[0]}x{size[1]}; it should be the source's first frame, edited",
            stacklevel=2,
        )
    return resize_and_crop(image, size, max_stretch)[0]


def fit_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(F, H, W, 3) in 0..1 -> (F, height, width) bool, thresholded at one half."""
    return resize_and_crop(mask, size).mean(dim=-1) > 0.5


def edit_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """(width, height) of a source -> the size to edit it at: multiples of 16 of nearly its shape, with about `max_pixels` at most.

    The whole picture is scaled to it, by up to a few per cent more in one direction than in the other. A source that is smaller is
    not enlarged.
    """
    width, height = size
    most = min(max_pixels * AREA_SLACK, max(width * height, MIN_SIDE**2) * AREA_SLACK)
    best = (MIN_SIDE, MIN_SIDE)
    cost = math.inf
    for columns in range(1, int(most / MIN_SIDE / SIZE_MULTIPLE) + 1):
        for rows in {max(1, int(columns * height / width)), int(columns * height / width) + 1}:
            area = columns * rows * SIZE_MULTIPLE**2
            if area <= most:
                stretch = abs(math.log(columns * height / (rows * width)))
                found = stretch + AREA_WEIGHT * math.log(most / area)
                if found < cost:
                    best, cost = (columns * SIZE_MULTIPLE, rows * SIZE_MULTIPLE), found
    return best


def resize(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) -> (height, width, 3) for size (width, height): bicubic with antialiasing, nothing cropped."""
    if frame.shape[:2] == size[::-1]:
        return frame
    resized = functional.interpolate(frame.movedim(-1, 0)[None], size[::-1], mode="bicubic", antialias=True)
    return resized[0].movedim(0, -1).clamp(0, 1).contiguous()


def resize_and_crop(frames: Tensor, size: tuple[int, int], max_stretch: float = 1.0) -> Tensor:
    """(F, H, W, 3) -> (F, height, width, 3): scaled to cover size (width, height), cropped at the centre.

    Scaled whole instead, with nothing cropped, where that scales one direction at most `max_stretch` times as much as the other.
    """
    width, height = size
    if frames.shape[1:3] == (height, width):
        return frames
    if 1 < stretch_of(frames.shape, size) <= max_stretch:
        return torch.stack([resize(frame, size) for frame in frames])
    scale = max(width / frames.shape[2], height / frames.shape[1])
    scaled = (max(height, round(frames.shape[1] * scale)), max(width, round(frames.shape[2] * scale)))
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    images = [
        functional.interpolate(frame.movedim(-1, 0)[None], scaled, mode="bicubic", antialias=True)[0, :, top : top + height, left : left + width]
        for frame in frames
    ]  # one at a time, so that the enlarged clip is never in memory
    return torch.stack(images).movedim(1, -1).clamp(0, 1).contiguous()


def stretch_of(shape: Sequence[int], size: tuple[int, int]) -> float:
    """Of frames (F, H, W, ...) that are scaled whole to size (width, height): how many times one direction is scaled as much as the other."""
    ratio = shape[2] * size[1] / (shape[1] * size[0])
    return max(ratio, 1 / ratio)


def valid_num_frames(num_frames: int) -> int:
    """The largest number of the form 4n+1 up to num_frames."""
    return (num_frames - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1


def nearest_side(side: int) -> int:
    """The multiple of 16 nearest to a side in pixels, within bounds."""
    return min(MAX_SIDE, max(SIZE_MULTIPLE, int(side / SIZE_MULTIPLE + 0.5) * SIZE_MULTIPLE))
