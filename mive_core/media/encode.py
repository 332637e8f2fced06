"""Frames -> video files: one plain default for each container, and the formats that people ask for by name.

H x W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from ..errors import UserError
from .decode import EXACT, SITED_LEFT, reason

BT709 = 1  # ISO/IEC 23091-2's number, of primaries, transfer and matrix alike
TV_RANGE = 1


@dataclass(frozen=True)
class VideoFormat:
    """How frames are encoded: the encoder, its pixel format, and what `--crf` means to it."""

    encoder: str
    layout: str  # pixel format
    suffixes: tuple[str, ...]  # of the containers that take it
    options: dict[str, str] = field(default_factory=dict)
    crf: int | None = None  # default of the encoder's constant rate factor; None: it has none
    largest_crf: int = 51
    odd_layout: str | None = None  # pixel format of odd sizes; None: `layout` takes them
    is_rgb: bool = False
    is_deep: bool = False  # more than 8 bits
    holds_sound: bool = True


FORMATS = {
    "h264": VideoFormat("libx264", "yuv420p", (".mp4", ".mov", ".mkv"), {"preset": "medium"}, crf=12, odd_layout="yuv444p"),
    "ffv1": VideoFormat("ffv1", "bgr0", (".mkv",), {"level": "3", "slicecrc": "1"}, is_rgb=True),
    "prores": VideoFormat("prores_ks", "yuv422p10le", (".mov",), {"profile": "hq", "vendor": "apl0"}, is_deep=True, odd_layout="yuv444p10le"),
    "prores4444": VideoFormat("prores_ks", "yuv444p10le", (".mov",), {"profile": "4444", "vendor": "apl0"}, is_deep=True),
    "vp9": VideoFormat("libvpx-vp9", "yuv420p", (".webm", ".mkv"), {"b": "0", "row-mt": "1", "cpu-used": "2"}, crf=18, largest_crf=63, odd_layout="yuv444p"),
    "av1": VideoFormat("libsvtav1", "yuv420p", (".webm", ".mkv", ".mp4"), {"preset": "6"}, crf=20, largest_crf=63),
    "gif": VideoFormat("gif", "pal8", (".gif",), is_rgb=True, holds_sound=False),
}
DEFAULTS = {".mp4": "h264", ".mov": "h264", ".mkv": "h264", ".webm": "vp9", ".gif": "gif"}
VIDEO_SUFFIXES = tuple(DEFAULTS)


@dataclass(frozen=True)
class Encoding:
    """What the user chose: a key of FORMATS, "" for the container's default, and a constant rate factor, None for the format's."""

    codec: str = ""
    crf: int | None = None

    @property
    def suffix(self) -> str:
        """The usual suffix of a file of this codec. Raises UserError for an unknown one."""
        if self.codec and self.codec not in FORMATS:
            raise UserError("unknown codec", got=repr(self.codec), expected=", ".join(FORMATS))
        return FORMATS[self.codec or "h264"].suffixes[0]

    def codec_of(self, path: Path) -> str:
        """The chosen codec, or the default of a video file's suffix."""
        return self.codec or DEFAULTS[path.suffix.lower()]

    def check(self, path: Path) -> VideoFormat:
        """Returns the format for a file. Raises UserError for an unknown one, one that the container does not hold, and a crf that it lacks."""
        codec, suffix = self.codec_of(path), path.suffix.lower()
        if codec not in FORMATS:
            raise UserError("unknown codec", where=path, got=repr(codec), expected=", ".join(FORMATS))
        chosen = FORMATS[codec]
        if suffix not in chosen.suffixes:
            raise UserError(f"{suffix} does not hold {codec} here", where=path, expected=" or ".join(chosen.suffixes), fix="change the file's suffix")
        if self.crf is not None and (chosen.crf is None or not 0 <= self.crf <= chosen.largest_crf):
            expected = "none" if chosen.crf is None else f"0 to {chosen.largest_crf}"
            raise UserError(f"{codec} takes no such crf", where=path, got=self.crf, expected=expected, fix="leave --crf out")
        return chosen


@contextmanager
def encoder(partial: Path, size: tuple[int, int], fps: float, path: Path, encoding: Encoding = Encoding()) -> Iterator[Callable[[Tensor], None]]:
    """Yields a function that encodes one frame, (H, W, 3) in 0..1, to `partial`; messages name `path`. Raises UserError."""
    chosen, rate = encoding.check(path), frame_rate(fps, path)
    is_odd = bool(size[0] % 2 or size[1] % 2)
    layout = chosen.odd_layout if is_odd and chosen.odd_layout else chosen.layout
    options = chosen.options | ({} if chosen.crf is None else {"crf": str(chosen.crf if encoding.crf is None else encoding.crf)})
    try:
        with av.open(str(partial), "w") as container:
            stream: av.VideoStream = container.add_stream(chosen.encoder, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = *size, layout
            if not chosen.is_rgb:
                context = stream.codec_context
                context.color_primaries = context.color_trc = context.colorspace = BT709
                context.color_range = TV_RANGE
            given = "rgb48le" if chosen.is_deep else "rgb24"  # from 16 bits to 8 swscale would round up
            graph = _conversion(size, given, layout, rate, chosen)
            count = 0

            def encode(frame: Tensor) -> None:
                nonlocal count
                video_frame = av.VideoFrame.from_ndarray(quantise(frame, chosen.is_deep), format=given)
                video_frame.pts, video_frame.time_base = count, 1 / rate
                count += 1
                graph.push(video_frame)
                container.mux(stream.encode(graph.pull()))  # type: ignore[arg-type]  # the graph has no sound

            yield encode
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise UserError(f"could not be encoded ({reason(error)})", where=path, fix="check space and permissions") from error


def frame_rate(fps: float, path: Path) -> Fraction:
    """Raises UserError for a rate that makes no video."""
    if not 0 < fps < 1000:
        raise UserError("the frame rate makes no video", where=path, got=fps, expected="more than 0, less than 1000")
    return Fraction(fps).limit_denominator(1001)


def quantise(frame: Tensor, is_deep: bool) -> np.ndarray:
    """(H, W, 3) in 0..1 -> uint16 or uint8."""
    levels = (frame.float() * (65535 if is_deep else 255)).round().cpu().numpy()
    return levels.astype(np.uint16 if is_deep else np.uint8)


def _conversion(size: tuple[int, int], given: str, layout: str, rate: Fraction, chosen: VideoFormat) -> av.filter.Graph:
    """A filter graph from pixels `given` to the encoder's pixel format, `layout`."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=size[0], height=size[1], format=av.VideoFormat(given), time_base=1 / rate)
    colours = "" if chosen.is_rgb else ":out_color_matrix=bt709:out_range=tv"
    sited = ":" + SITED_LEFT.format("out") if "420" in layout else ""
    if layout != "pal8":
        scale = graph.add("scale", f"flags={EXACT}{colours}{sited}")
        graph.link_nodes(source, scale, graph.add("format", layout), graph.add("buffersink")).configure()
        return graph
    split, palette, use, sink = graph.add("split"), graph.add("palettegen", "stats_mode=single"), graph.add("paletteuse", "new=1"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph
