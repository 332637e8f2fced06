"""Image files, animations and folders of frames <-> pixels in 0..1.

F frames, H x W pixels.
"""

import os
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from .decode import reason
from .fit import as_rgb, check_frames, check_size
from .paths import check_input, describe

DEEP_SUFFIXES = (".exr", ".dpx")  # which FFmpeg reads and PIL does not
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", *DEEP_SUFFIXES)
EXPECTED = "PNG, JPEG, WebP, BMP, TIFF, EXR or DPX"
MAX_HELD_BYTES = 2**29  # of an animation whose frames are repeated where they last longer
ANIMATIONS = ("WEBP", "PNG")  # PIL's names of image formats that may be animated
# what PIL's readers raise on damaged files
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, Image.DecompressionBombError)
BITS_PER_SAMPLE, ORIENTATION = 258, 274  # TIFF's tags
# EXIF's numbers: quarter turns against the clock, then whether it is mirrored from left to right
ORIENTATIONS = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
DEFAULT_DURATION = 100  # ms of an animation's frame that gives none, as browsers have it


def read_image(path: str | os.PathLike, *, what: str = "image") -> Tensor:
    """One image file -> (H, W, 3) float32 in 0..1, rotated as its EXIF data require.

    Gray is expanded; transparency is composited over black, with a warning. EXR is taken for linear light and gets the sRGB curve, with a
    warning; DPX is taken as it is stored. Raises UserError.
    """
    path = check_input(path, what)
    where = f"{what} {str(path)!r}"
    if path.is_dir():
        raise UserError("is a folder", where=where, expected="one image file")
    _note_linear(path, where)
    return as_rgb(torch.from_numpy(_read_pixels(path, where)), where)


def read_animation(path: Path, what: str, num_frames: int | None = None) -> tuple[Tensor, float] | None:
    """An animated WebP or PNG -> (F, H, W, 3) in 0..1 and frames a second, a constant rate; None for a still image or another file.

    The rate is that of the most frequent duration; frames that last longer are repeated. Raises UserError.
    """
    where = f"{what} {str(path)!r}"
    try:
        with Image.open(path) as image:
            if image.format not in ANIMATIONS or getattr(image, "n_frames", 1) < 2:
                return None
            check_size(image.width, image.height, where)
            frames, durations = [], []
            for index in range(image.n_frames):
                image.seek(index)
                frames.append(as_rgb(torch.from_numpy(_image_pixels(image)), where))
                durations.append(int(image.info.get("duration") or DEFAULT_DURATION))
    except Image.UnidentifiedImageError:
        return None
    except PIL_ERRORS as error:
        raise UserError(f"the animation is damaged or too large ({error})", where=where, got=describe(path), fix="save it again") from None
    usual = Counter(durations).most_common(1)[0][0]
    repeats = [max(round(duration / usual), 1) for duration in durations]
    if len(set(durations)) > 1:
        warnings.warn(f"{where}: its frame rate varies; read at a constant {1000 / usual:.4g} frames a second", stacklevel=3)
    shown = sum(repeats) if num_frames is None else min(sum(repeats), num_frames)
    if shown > len(frames) and shown * frames[0].nbytes > MAX_HELD_BYTES:
        longest = max(durations)
        raise UserError(
            "a frame of the animation lasts so long that repeating it takes too much memory",
            where=where,
            got=f"{longest / 1000:.4g} s, where most last {usual / 1000:.4g} s",
            fix="save it again as a video, or with a shorter duration",
        )
    return torch.stack([frame for frame, times in zip(frames, repeats) for _ in range(times)][:num_frames]), 1000 / usual


def folder_frames(folder: Path, what: str, num_frames: int | None) -> Iterator[Tensor]:
    """Yields a folder's images, (H, W, 3) in 0..1, in natural order. Raises UserError if there are none, or of several sizes."""
    where = f"{what} {str(folder)!r}"
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")), key=_natural_key)
    if not paths:
        raise UserError("the folder holds no frames", where=where, got=f"{len(list(folder.iterdir()))} other entries", expected=" or ".join(IMAGE_SUFFIXES))
    _note_linear(paths[0], where)
    first: Tensor | None = None
    for path in paths[:num_frames]:
        name = f"{what}'s frame {str(check_input(path, what))!r}"
        frame = as_rgb(torch.from_numpy(_read_pixels(path, name)), name)
        first = frame if first is None else first
        if frame.shape != first.shape:
            raise UserError("the frames differ in size", where=f"{what} {str(path)!r}", got=_size(frame), expected=f"{_size(first)}, as {paths[0].name} has")
        yield frame


def write_frames(folder: Path, frames: Tensor) -> None:
    """(F, H, W, 3) in 0..1, or (F, H, W) bool -> folder/00000.png ...; lossless at 8 bits. Creates `folder`."""
    folder.mkdir(parents=True)
    if frames.dtype != torch.bool:
        frames = check_frames(frames, f"output {str(folder)!r}")
    for index, frame in enumerate(frames):
        write_image(folder / f"{index:05d}.png", frame)


def write_image(path: Path, image: Tensor) -> None:
    """(H, W, 3) in 0..1, or (H, W) bool -> PNG; lossless at 8 bits."""
    Image.fromarray((image.float() * 255).round().to(torch.uint8).cpu().numpy()).save(path)


def _note_linear(path: Path, where: str) -> None:
    if path.suffix.lower() == ".exr":
        warnings.warn(f"{where}: EXR is taken for linear light of BT.709 primaries, and read with the sRGB curve", stacklevel=3)


def _read_pixels(path: Path, where: str) -> np.ndarray:
    """-> (H, W, 1, 3 or 4) float32 in 0..1. Raises UserError."""
    if path.suffix.lower() in DEEP_SUFFIXES:
        return _read_deep(path, where)
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a phone's JPEG with a second view behind the picture
                raise UserError("holds more than one image", where=where, got=f"{image.n_frames} images", expected="one")
            check_size(image.width, image.height, where)
            if _is_deep(image):
                return _upright(_read_deep(path, where), image.getexif().get(ORIENTATION, 1))  # PIL would keep 8 of the bits
            return _image_pixels(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        if path.suffix.lower() in (".tif", ".tiff"):  # PIL knows none with floats in three channels
            return _read_deep(path, where)
        raise UserError("is not an image that can be read", where=where, got=describe(path), expected=EXPECTED) from None
    except PIL_ERRORS as error:
        raise UserError(f"the image is damaged or too large ({error})", where=where, got=describe(path), fix="save it again") from None


def _is_deep(image: Image.Image) -> bool:
    """Whether an opened TIFF or PNG has more than 8 bits in a colour, of which PIL would keep 8."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8 and image.mode.startswith("RGB")  # type: ignore[attr-defined]
    return image.format == "PNG" and not image.mode.startswith("I") and "16" in str(image.tile[0][3])  # of a single channel PIL keeps all 16


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> as EXIF's orientation asks for."""
    turns, mirrored = ORIENTATIONS.get(orientation, (0, False))
    pixels = np.rot90(pixels, turns)
    return np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)


def _image_pixels(image: Image.Image) -> np.ndarray:
    """PIL image -> (H, W, C) float32 in 0..1, C 1, 3 or 4."""
    if image.mode.startswith("I"):  # 16 bits in one channel
        return np.asarray(image).astype(np.float32)[..., None] / 65535
    if image.mode == "F":
        return np.array(image)[..., None]
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if transparent else "RGB"), dtype=np.float32) / 255


def _read_deep(path: Path, where: str) -> np.ndarray:
    """EXR, DPX or TIFF by FFmpeg -> (H, W, 3 or 4) float32 in 0..1; floats are linear light and get the sRGB curve."""
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            frame = next(container.decode(video=0))
        check_size(frame.width, frame.height, where)
        has_alpha = any(component.is_alpha for component in frame.format.components)
        if frame.format.components[0].bits < 32 and "f16" not in frame.format.name:
            return frame.to_ndarray(format="rgba64le" if has_alpha else "rgb48le").astype(np.float32) / 65535
        pixels = frame.reformat(format="gbrapf32le" if has_alpha else "gbrpf32le").to_ndarray()
    except (av.FFmpegError, OSError, StopIteration, ValueError) as error:
        raise UserError(f"is not an image that can be read ({reason(error)})", where=where, got=describe(path), expected=EXPECTED) from None
    pixels[..., :3] = srgb_curve(pixels[..., :3])
    return pixels


def srgb_curve(light: np.ndarray) -> np.ndarray:
    """Linear light -> sRGB's signal, IEC 61966-2-1; clipped to 0..1. NaN, which renderers write, becomes 0."""
    light = np.clip(np.nan_to_num(light, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055).astype(np.float32)


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Sort key that puts frame2 before frame10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", path.name.lower())]


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
