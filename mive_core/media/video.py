"""Clips as people have them, video files, animations, folders of frames and images <-> pixels in 0..1.

F frames, H x W pixels.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..types import Clip
from .decode import decode_video, read_timing
from .encode import VIDEO_SUFFIXES, Encoding, encoder
from .fit import as_rgb, check_frames
from .images import IMAGE_SUFFIXES, folder_frames, read_animation, read_image, write_image
from .paths import atomic_folder, atomic_write, check_input, check_output, check_output_folder, remove_partials_of
from .sound import add_sound

DEFAULT_FPS = 24.0  # of a folder of frames, or of a file without a frame rate
MAX_CLIP_BYTES = 16 * 2**30


def read_clip(path: str | os.PathLike, *, what: str = "video", fps: float = DEFAULT_FPS, num_frames: int | None = None) -> Clip:
    """A video file, an animation, a folder of frames in natural order, or one image -> Clip of (F, H, W, 3) in 0..1.

    `fps` applies to folders, images and files without a frame rate. At most `num_frames` are read.
    Raises UserError that names `what` for anything but a readable video; warns as decode_video does.
    """
    path = check_input(path, what)
    where = f"{what} {str(path)!r}"
    if path.is_dir():
        return Clip(torch.stack(list(_within_memory(folder_frames(path, what, num_frames), where))), fps)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        animation = read_animation(path, what, num_frames)
        return Clip(read_image(path, what=what)[None], fps) if animation is None else Clip(*animation)
    frames = np.stack(list(_within_memory(decode_video(path, what, num_frames), where)))
    return Clip(as_rgb(_in_unit_range(frames), where), read_fps(path, fps))


def stream_clip(path: str | os.PathLike, *, what: str = "video", num_frames: int | None = None) -> Iterator[Tensor]:
    """A source as `read_clip` takes it -> its frames, (H, W, 3) float32 in 0..1, one by one. Raises UserError."""
    path = check_input(path, what)
    if path.is_dir():
        for index, frame in enumerate(folder_frames(path, what, num_frames)):
            yield check_frames(frame[None], f"{what} {str(path)!r}, frame {index}")[0]
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield from read_clip(path, what=what, num_frames=num_frames).frames
    else:
        for pixels in decode_video(path, what, num_frames):
            yield as_rgb(_in_unit_range(np.ascontiguousarray(pixels)), f"{what} {str(path)!r}")


def read_fps(path: str | os.PathLike, fps: float = DEFAULT_FPS) -> float:
    """Frames a second at which a source is read; `fps` for folders, images and files without a frame rate."""
    path = Path(path)
    if _is_file(path):
        return float(read_timing(path).rate or fps)
    animation = None if path.is_dir() else read_animation(path, "video")
    return fps if animation is None else animation[1]


def read_num_frames(path: str | os.PathLike) -> int | None:
    """Number of frames that a source is read as, for a video file as its header or its times tell. None if it is not known."""
    path = Path(path)
    if path.is_dir():
        return sum(p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") for p in path.iterdir())
    if _is_file(path):
        return read_timing(path).num_frames
    animation = read_animation(path, "video")
    return 1 if animation is None else len(animation[0])


def write_video(path: str | os.PathLike, clip: Clip, *, sound: Path | None = None, encoding: Encoding = Encoding()) -> Path:
    """Clip -> a file of the format that `encoding` names, by default the suffix's (see encode.DEFAULTS), written completely or not at all.

    A path without a suffix becomes a folder of PNG. `sound` is a source as `read_clip` takes it, whose sound the file gets, see `add_sound`.
    Raises UserError for odd sizes in H.264, non-finite pixels and paths that cannot be written.
    """
    path = check_video_output(path, encoding)
    frames = check_frames(clip.frames, f"output {str(path)!r}")
    height, width = frames.shape[1:3]
    if (height % 2 or width % 2) and path.suffix and encoding.codec_of(path) == "h264":
        raise UserError("H.264 in yuv420p needs even sizes", where=path, got=f"{width}x{height}")
    return _write(path, frames, (width, height), clip.fps, sound, encoding)


def write_stream(
    path: str | os.PathLike, frames: Iterable[Tensor], size: tuple[int, int], fps: float, *, sound: Path | None = None, encoding: Encoding = Encoding()
) -> Path:
    """Frames (H, W, 3) in 0..1, one by one -> a file as `write_video` makes it; for odd sizes 4:4:4. Memory holds one frame at a time.

    `sound` and `encoding` as in `write_video`. Raises UserError as that does, and what `frames` raises.
    """
    path = check_video_output(path, encoding)
    if (size[0] % 2 or size[1] % 2) and path.suffix and encoding.check(path).odd_layout:
        warnings.warn(f"{path}: {size[0]}x{size[1]} is odd, so the file is 4:4:4, which some players do not show", stacklevel=2)
    return _write(path, frames, size, fps, sound, encoding)


def check_video_output(path: str | os.PathLike, encoding: Encoding = Encoding()) -> Path:
    """Returns the path if a clip can be written there in that format. Raises UserError."""
    if not Path(path).suffix:
        folder = check_output_folder(path, "output")
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError("the folder is not empty", where=f"output {str(folder)!r}", fix="choose another folder, or a file of a known type")
        if encoding != Encoding():
            raise UserError("a folder of PNG has no codec and no crf", where=f"output {str(folder)!r}", fix="leave them out, or name a video file")
        return folder
    path = check_output(path, "output", VIDEO_SUFFIXES)
    encoding.check(path)
    return path


def _write(path: Path, frames: Iterable[Tensor], size: tuple[int, int], fps: float, sound: Path | None, encoding: Encoding) -> Path:
    remove_partials_of(path)
    if not path.suffix:
        with atomic_folder(path) as partial:
            for index, frame in enumerate(frames):
                write_image(partial / f"{index:05d}.png", frame)
        return path
    with atomic_write(path) as partial:
        with encoder(partial, size, fps, path, encoding) as encode:
            for frame in frames:
                encode(frame)
        if sound is not None and _is_file(sound) and encoding.check(path).holds_sound:
            add_sound(partial, sound, path)
    return path


def _is_file(path: str | os.PathLike) -> bool:
    """Whether a source is a video file, not a folder of frames or an image."""
    return not os.path.isdir(path) and Path(path).suffix.lower() not in IMAGE_SUFFIXES


def _in_unit_range(frames: np.ndarray) -> Tensor:
    """uint8, uint16 or float32 pixels -> float32 in 0..1."""
    if frames.dtype == np.uint16:
        frames = frames.astype(np.float32) / 65535
    pixels = torch.from_numpy(frames)
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def _within_memory(frames: Iterable, where: str) -> Iterator:
    """Yields (H, W, C) frames while a clip of them can be held. Raises UserError."""
    for count, frame in enumerate(frames, 1):
        limit = MAX_CLIP_BYTES // (frame.shape[0] * frame.shape[1] * 12)
        if count > limit:
            raise UserError(
                "the clip is too long to be held in memory",
                where=where,
                got=f"more than {limit} frames of {frame.shape[1]}x{frame.shape[0]}",
                fix="give the number of frames, or a smaller video",
            )
        yield frame
