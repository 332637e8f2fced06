"""Video files, folders of frames and images <-> pixels in 0..1.

F frames, H x W pixels.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..types import Clip
from .fit import as_rgb, check_frames, check_size
from .paths import atomic_write, check_input, check_output
from .sound import add_sound

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")
DEFAULT_FPS = 24.0  # of a folder of frames, or of a file without a frame rate
MAX_CLIP_BYTES = 16 * 2**30
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_clip(path: str | os.PathLike, *, what: str = "video", fps: float = DEFAULT_FPS, num_frames: int | None = None) -> Clip:
    """A video file, a folder of frames in natural order, or one image -> Clip of (F, H, W, 3) in 0..1.

    `fps` applies to folders, images and files without a frame rate. At most `num_frames` are read.
    Raises UserError that names `what` for anything but a readable video.
    """
    path = check_input(path, what)
    if path.is_dir():
        return Clip(_read_folder(path, what, num_frames), fps)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Clip(read_image(path, what=what)[None], fps)
    return _read_file(path, what, fps, num_frames)


def read_image(path: str | os.PathLike, *, what: str = "image") -> Tensor:
    """One image file -> (H, W, 3) float32 in 0..1, rotated as its EXIF data require.

    Gray is expanded; transparency is composited over black, with a warning. Raises UserError.
    """
    path = check_input(path, what)
    where = f"{what} {str(path)!r}"
    if path.is_dir():
        raise UserError("is a folder", where=where, expected="one image file")
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UserError("holds more than one image", where=where, got=f"{image.n_frames} images", expected="one")
            check_size(image.width, image.height, where)
            pixels = _image_pixels(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError("is not an image that can be read", where=where, got=_describe(path), expected="PNG, JPEG or WebP") from None
    except PIL_ERRORS as error:
        raise UserError(f"the image is damaged or too large ({error})", where=where, got=_describe(path), fix="save it again") from None
    return as_rgb(torch.from_numpy(pixels), where)


def write_video(path: str | os.PathLike, clip: Clip, *, sound: Path | None = None) -> Path:
    """Clip -> H.264 file (.mp4, .mov or .mkv; yuv420p, crf 12, BT.709), written completely or not at all.

    `sound` is a source as `read_clip` takes it, whose sound the file gets, see `add_sound`.
    Raises UserError for odd sizes, non-finite pixels and paths that cannot be written.
    """
    path = check_output(path, "output", VIDEO_SUFFIXES)
    frames = check_frames(clip.frames, f"output {str(path)!r}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError("H.264 in yuv420p needs even sizes", where=path, got=f"{width}x{height}")
    return _write(path, frames, (width, height), clip.fps, sound)


def write_stream(path: str | os.PathLike, frames: Iterable[Tensor], size: tuple[int, int], fps: float, *, sound: Path | None = None) -> Path:
    """Frames (H, W, 3) in 0..1, one by one -> a file as `write_video` makes it; for odd sizes yuv444p. Memory holds one frame at a time.

    `sound` as in `write_video`. Raises UserError as that does, and what `frames` raises.
    """
    path = check_output(path, "output", VIDEO_SUFFIXES)
    if size[0] % 2 or size[1] % 2:
        warnings.warn(f"{path}: {size[0]}x{size[1]} is odd, so the file is 4:4:4, which some players do not show", stacklevel=2)
    return _write(path, frames, size, fps, sound)


def stream_clip(path: str | os.PathLike, *, what: str = "video", num_frames: int | None = None) -> Iterator[Tensor]:
    """A source as `read_clip` takes it -> its frames, (H, W, 3) float32 in 0..1, one by one. Raises UserError."""
    path = check_input(path, what)
    if path.is_dir():
        for index, frame in enumerate(_folder_frames(path, what, num_frames)):
            yield check_frames(frame[None], f"{what} {str(path)!r}, frame {index}")[0]
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield read_image(path, what=what)
    else:
        for pixels in _decode_file(path, what, num_frames):
            yield as_rgb(torch.from_numpy(np.ascontiguousarray(pixels)).float().div_(255), f"{what} {str(path)!r}")


def read_fps(path: str | os.PathLike, fps: float = DEFAULT_FPS) -> float:
    """Frames a second of a video file; `fps` for folders, images and files without a frame rate."""
    return _file_rate(Path(path), fps) if _is_file(path) else fps


def read_num_frames(path: str | os.PathLike) -> int | None:
    """Number of frames of a video file as its header or its duration tells, of images in a folder, 1 of an image. None if it is not known."""
    path = Path(path)
    if path.is_dir():
        return sum(p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") for p in path.iterdir())
    if not _is_file(path):
        return 1
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.frames:
            return stream.frames
        return round(container.duration / av.time_base * stream.average_rate) if container.duration and stream.average_rate else None


def write_frames(folder: Path, frames: Tensor) -> None:
    """(F, H, W, 3) in 0..1, or (F, H, W) bool -> folder/00000.png ...; lossless at 8 bits. Creates `folder`."""
    folder.mkdir(parents=True)
    if frames.dtype != torch.bool:
        frames = check_frames(frames, f"output {str(folder)!r}")
    for index, frame in enumerate(frames):
        write_image(folder / f"{index:05d}.png", frame)


def write_image(path: Path, image: Tensor) -> None:
    """(H, W, 3) in 0..1, or (H, W) bool -> PNG; lossless at 8 bits."""
    Image.fromarray(_to_uint8(image)).save(path)


def _write(path: Path, frames: Iterable[Tensor], size: tuple[int, int], fps: float, sound: Path | None) -> Path:
    with atomic_write(path) as partial:
        with _encoder(partial, size, _frame_rate(fps, path), path) as encode:
            for frame in frames:
                encode(frame)
        if sound is not None and _is_file(sound):
            add_sound(partial, sound, path)
    return path


def _is_file(path: str | os.PathLike) -> bool:
    """Whether a source is a video file, not a folder of frames or an image."""
    return not os.path.isdir(path) and Path(path).suffix.lower() not in IMAGE_SUFFIXES


def _image_pixels(image: Image.Image) -> np.ndarray:
    """PIL image -> (H, W, C) float32 in 0..1, C 1, 3 or 4."""
    if image.mode.startswith("I"):  # 16 bits in one channel
        return np.asarray(image).astype(np.float32)[..., None] / 65535
    if image.mode == "F":
        return np.array(image)[..., None]
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if transparent else "RGB"), dtype=np.float32) / 255


def _read_folder(folder: Path, what: str, num_frames: int | None) -> Tensor:
    frames: list[Tensor] = []
    for frame in _folder_frames(folder, what, num_frames):
        frames.append(frame)
        _check_memory(len(frames), frame.shape[0], frame.shape[1], f"{what} {str(folder)!r}")
    return torch.stack(frames)


def _folder_frames(folder: Path, what: str, num_frames: int | None) -> Iterator[Tensor]:
    where = f"{what} {str(folder)!r}"
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")), key=_natural_key)
    if not paths:
        raise UserError("the folder holds no frames", where=where, got=f"{len(list(folder.iterdir()))} other entries", expected=" or ".join(IMAGE_SUFFIXES))
    first: Tensor | None = None
    for path in paths[:num_frames]:
        frame = read_image(path, what=f"{what}'s frame")
        first = frame if first is None else first
        if frame.shape != first.shape:
            raise UserError("the frames differ in size", where=f"{what} {str(path)!r}", got=_size(frame), expected=f"{_size(first)}, as {paths[0].name} has")
        yield frame


def _read_file(path: Path, what: str, fps: float, num_frames: int | None) -> Clip:
    where = f"{what} {str(path)!r}"
    frames: list[np.ndarray] = []
    for pixels in _decode_file(path, what, num_frames):
        frames.append(pixels)
        _check_memory(len(frames), pixels.shape[0], pixels.shape[1], where)
    return Clip(as_rgb(torch.from_numpy(np.stack(frames)).float().div_(255), where), _file_rate(path, fps))


def _decode_file(path: Path, what: str, num_frames: int | None) -> Iterator[np.ndarray]:
    """Yields the frames of a video file, (H, W, 3 or 4) uint8, one by one. Raises UserError."""
    where = f"{what} {str(path)!r}"
    num_packets, count, shape = 0, 0, None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError("the file has no video stream", where=where)
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            declared = stream.frames
            for packet in container.demux(stream):
                num_packets += packet.size > 0
                for frame in packet.decode():
                    check_size(frame.width, frame.height, where)
                    pixels = _frame_pixels(frame)
                    if shape is not None and pixels.shape != shape:
                        raise UserError("the picture changes its size inside the video", where=where)
                    shape = pixels.shape
                    if num_frames is None or count < num_frames:
                        yield pixels
                    count += 1
                if num_frames is not None and count >= num_frames:
                    break
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"is not a video that can be read ({_reason(error)})", where=where, got=f"{_describe(path)}, {count} frames decoded", expected="a whole video file"
        ) from None
    if not count:
        raise UserError("the video holds 0 frames", where=where, got=_describe(path), expected="1 or more")
    if num_packets < declared and num_frames is None:  # counts packets, since an edit list may hide frames of a complete file
        raise UserError(
            "the file is truncated",
            where=where,
            got=f"{num_packets} frames in {_describe(path)}",
            expected=f"{declared} frames",
            fix="copy it again, or ask for fewer frames",
        )


def _file_rate(path: Path, fps: float) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or fps)


def _frame_pixels(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3 or 4) uint8, rotated upright."""
    alpha = any(component.is_alpha for component in frame.format.components)
    pixels = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    return np.rot90(pixels, round(frame.rotation / 90) % 4)


@contextmanager
def _encoder(partial: Path, size: tuple[int, int], rate: Fraction, path: Path) -> Iterator[Callable[[Tensor], None]]:
    """Yields a function that encodes one frame, (H, W, 3) in 0..1. Sides that are odd need 4:4:4, which not every player shows."""
    layout = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
    try:
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "medium"})
            stream.width, stream.height, stream.pix_fmt = *size, layout
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
            context.color_range = 1  # 16..235

            def encode(frame: Tensor) -> None:
                video_frame = av.VideoFrame.from_ndarray(_to_uint8(frame), format="rgb24")
                container.mux(stream.encode(video_frame.reformat(format=layout, dst_colorspace="ITU709")))

            yield encode
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise UserError(f"could not be encoded ({_reason(error)})", where=path, fix="check space and permissions") from error


def _frame_rate(fps: float, path: Path) -> Fraction:
    if not 0 < fps < 1000:
        raise UserError("the frame rate makes no video", where=path, got=fps, expected="more than 0, less than 1000")
    return Fraction(fps).limit_denominator(1001)


def _to_uint8(frame: Tensor) -> np.ndarray:
    return (frame.float() * 255).round().to(torch.uint8).cpu().numpy()


def _check_memory(num_frames: int, height: int, width: int, where: str) -> None:
    limit = MAX_CLIP_BYTES // (height * width * 12)
    if num_frames > limit:
        raise UserError(
            "the clip is too long to be held in memory",
            where=where,
            got=f"more than {limit} frames of {width}x{height}",
            fix="give the number of frames, or a smaller video",
        )


def _natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Sort key that puts frame2 before frame10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"([0-9]+)", path.name.lower())]


def _describe(path: Path) -> str:
    """Describes an unreadable file by its first bytes and its length, for an error message."""
    with open(path, "rb") as file:
        head = file.read(512)
    length = f"{path.stat().st_size} bytes"
    if head.lstrip()[:1] == b"<":
        return f"an HTML or XML page of {length}"
    if head[:4] == b"PK\x03\x04":
        return f"a zip archive of {length}"
    if head[4:8] == b"ftyp":
        return f"an MP4 file of {length}"
    return length


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
