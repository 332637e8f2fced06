"""Video files -> frames as a player shows them: upright, square pixels, a constant rate, progressive, in the range of a standard display.

H x W pixels.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np

from ..errors import UserError
from .fit import check_size
from .paths import describe
from .tone_map import TRANSFERS, to_standard_range

# of swscale: without them every conversion darkens by a level
EXACT = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
SITED_LEFT = "{0}_h_chr_pos=0:{0}_v_chr_pos=128"  # of 4:2:0, as H.264 and HEVC have it unless they say otherwise
HD_HEIGHT = 720  # untagged video of as many lines is taken for BT.709, and for BT.601 below
NUM_TIMED = 20_000  # packets whose times are looked at
JITTER = 0.25  # share of the usual interval by which one may differ in a constant rate
WHOLE_RATES = (8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 100, 120)
RATES = tuple(map(Fraction, WHOLE_RATES)) + tuple(Fraction(rate * 1000, 1001) for rate in (24, 30, 60))
PULLDOWN_SHARE = 0.9  # of neighbouring intervals that sum up to five fields, in film with the flags of 2:3 pulldown
SNAP = 0.004  # relative distance at which a measured rate is taken for one of RATES
MATRIX_COEFFICIENTS = {True: "bt709", False: "smpte170m"}  # is HD -> swscale's name
UNSPECIFIED = 2  # ISO/IEC 23091-2's number of an untagged matrix


@dataclass(frozen=True)
class Timing:
    """Frame rates: that of the file, None if it has none, and, where that varies, the constant one that it is read at; and the frames then read."""

    average: Fraction | None
    num_frames: int | None  # None: not known without decoding
    constant: Fraction | None = None
    is_pulldown: bool = False  # film whose frames are shown for two and for three fields in turn, as DVDs have it

    @property
    def rate(self) -> Fraction | None:
        return self.constant or self.average


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video stream that is not a cover picture; None if there is none."""
    cover = av.stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & cover), None)


def read_timing(path: Path) -> Timing:
    """Reads the times of a file's frames, without decoding any; once for each state of a file. Raises av.FFmpegError and OSError."""
    state = path.stat()
    return _read_timing(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _read_timing(path: Path, modified: int, size: int) -> Timing:
    with av.open(str(path), metadata_errors="replace") as container:
        stream = video_stream(container)
        if stream is None:
            return Timing(None, None)
        average, packets = stream.average_rate, islice(container.demux(stream), NUM_TIMED)
        times = [packet.pts for packet in packets if packet.size]
        timing = Timing(average, stream.frames or (len(times) if len(times) < NUM_TIMED - 1 else None))
    if len(times) < 3 or any(time is None for time in times):
        return timing
    intervals = np.diff(np.sort(np.array(times, dtype=np.int64)))
    usual = np.sort(intervals)[(len(intervals) - 1) // 2]  # one of them, where the median of an even number may be none
    is_usual = np.abs(intervals - usual) <= np.maximum(JITTER * usual, 1)
    if is_usual.all() or not stream.time_base or usual <= 0:
        return timing
    pulldown = _film_interval(intervals)
    measured = 1 / (Fraction(pulldown or float(intervals[is_usual].mean())) * stream.time_base)
    rate = min(RATES, key=lambda known: abs(known / measured - 1))
    constant = rate if abs(rate / measured - 1) < SNAP else measured.limit_denominator(1001)
    num_frames = round(float((max(times) - min(times)) * stream.time_base * constant)) + 1 if len(times) < NUM_TIMED - 1 else None
    return Timing(average, num_frames, constant, pulldown is not None)


def _film_interval(intervals: np.ndarray) -> float | None:
    """Mean interval of frames that are shown for two and for three fields in turn (2:3 pulldown by flags, "soft telecine"), None for others."""
    if len(intervals) < 4:
        return None
    pairs = intervals[:-1] + intervals[1:]
    five_fields = float(np.median(pairs))
    in_turn = np.abs(pairs - five_fields) <= JITTER * five_fields / 5
    in_fields = intervals / max(five_fields / 5, 1)
    is_film = np.minimum(np.abs(in_fields - 2), np.abs(in_fields - 3)) <= JITTER
    if (in_turn & is_film[1:]).mean() < PULLDOWN_SHARE:
        return None
    return float(pairs[in_turn].mean()) / 2


def decode_video(path: Path, what: str, num_frames: int | None) -> Iterator[np.ndarray]:
    """Yields the frames of a video file, (H, W, 3 or 4) uint8, or uint16 where it has more bits, or float32 in 0..1 where it is HDR.

    Warns where frames are changed to be shown: varying rates, interlacing, HDR, pixels that are not square. Raises UserError.
    """
    where = f"{what} {str(path)!r}"
    num_packets = count = 0
    try:
        timing = read_timing(path)
        with av.open(str(path), metadata_errors="replace") as container:
            stream = video_stream(container)
            if stream is None:
                raise UserError("the file has no video stream", where=where)
            stream.thread_type = "AUTO"
            declared = stream.frames
            converter: Converter | None = None
            for packet in chain(container.demux(stream), [None]):  # None: the end, which flushes the filters
                num_packets += packet is not None and packet.size > 0
                frames: Iterable[av.VideoFrame | None] = [None] if packet is None else packet.decode()
                for frame in frames:
                    if frame is not None:
                        check_size(frame.width, frame.height, where)
                        converter = Converter(stream, frame, timing, where) if converter is None else converter
                    for pixels in converter.convert(frame) if converter is not None else ():
                        if num_frames is None or count < num_frames:
                            yield pixels
                        count += 1
                if num_frames is not None and count >= num_frames:
                    break
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"is not a video that can be read ({reason(error)})", where=where, got=f"{describe(path)}, {count} frames decoded", expected="a whole video file"
        ) from None
    if not count:
        raise UserError("the video holds 0 frames", where=where, got=describe(path), expected="1 or more")
    if num_packets < declared and num_frames is None:  # counts packets, since an edit list may hide frames of a complete file
        raise UserError(
            "the file is truncated",
            where=where,
            got=f"{num_packets} frames in {describe(path)}",
            expected=f"{declared} frames",
            fix="copy it again, or ask for fewer frames",
        )


class Converter:
    """Converts decoded frames to pixels by a filter graph, laid out for the first frame. Warns of what it changes."""

    def __init__(self, stream: av.VideoStream, first: av.VideoFrame, timing: Timing, where: str):
        self.where, self.size = where, (first.width, first.height, first.format.name)
        self.quarter_turns = round(first.rotation / 90) % 4
        self.transfer = TRANSFERS.get(stream.codec_context.color_trc)
        self.graph = graph = av.filter.Graph()
        chain = [graph.add_buffer(template=stream, width=first.width, height=first.height, format=first.format)]
        if first.interlaced_frame:
            chain.append(graph.add("bwdif", "mode=send_frame:deint=interlaced"))
            warnings.warn(f"{where}: interlaced, so its lines were completed from their neighbours (bwdif)", stacklevel=2)
        if timing.constant is not None:
            if timing.is_pulldown:
                chain.append(graph.add("setpts", "PTS-STARTPTS"))  # a frame of film is then a fifth of a frame off its time, not more
            chain.append(graph.add("fps", f"fps={timing.constant}"))
            reason = "its frame rate varies" if not timing.is_pulldown else "film in 2:3 pulldown (soft telecine)"
            warnings.warn(f"{where}: {reason}; read at a constant {float(timing.constant):.4g} frames a second", stacklevel=2)
        width, height = square_size(stream, first)
        if (width, height) != (first.width, first.height):
            warnings.warn(f"{where}: its pixels are not square; {first.width}x{first.height} is read as {width}x{height}", stacklevel=2)
        if self.transfer is not None:
            warnings.warn(f"{where}: HDR ({self.transfer.name}), mapped to the range of a standard display ({self.transfer.method})", stacklevel=2)
        has_alpha = any(component.is_alpha for component in first.format.components)
        is_deep = self.transfer is not None or any(component.bits > 8 for component in first.format.components)
        layout = ("rgba64le" if has_alpha else "rgb48le") if is_deep else ("rgba" if has_alpha else "rgb24")
        chain += [graph.add("scale", f"{width}:{height}:flags={EXACT}{source_colours(first)}"), graph.add("format", layout), graph.add("buffersink")]
        graph.link_nodes(*chain).configure()

    def convert(self, frame: av.VideoFrame | None) -> Iterator[np.ndarray]:
        """One decoded frame, or None for the end -> the frames that are ready. Raises UserError if the picture changes its size."""
        if frame is not None and (frame.width, frame.height) != self.size[:2]:
            raise UserError("the picture changes its size inside the video", where=self.where)
        self.graph.push(frame)
        while True:
            try:
                pixels = self.graph.pull().to_ndarray()
            except (av.BlockingIOError, av.EOFError):
                return
            pixels = np.rot90(pixels, self.quarter_turns)
            yield pixels if self.transfer is None else to_standard_range(pixels, self.transfer)


def square_size(stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int]:
    """Width and height that show the frame with square pixels: the side that is too short is enlarged, to an even number."""
    ratio = stream.sample_aspect_ratio
    if not ratio or ratio == 1:
        return frame.width, frame.height
    return (2 * round(frame.width * ratio / 2), frame.height) if ratio > 1 else (frame.width, 2 * round(frame.height / ratio / 2))


def source_colours(frame: av.VideoFrame) -> str:
    """Options of the filter `scale` that say what the frame leaves open: the matrix of untagged video, and where chroma is sampled."""
    if frame.format.is_rgb or frame.format.components[0].is_alpha:
        return ""
    matrix = f":in_color_matrix={MATRIX_COEFFICIENTS[frame.height >= HD_HEIGHT]}" if frame.colorspace == UNSPECIFIED else ""
    return matrix + (":" + SITED_LEFT.format("in") if "420" in frame.format.name else "")


def reason(error: Exception) -> str:
    """A library's error in a few words."""
    return getattr(error, "strerror", None) or type(error).__name__
