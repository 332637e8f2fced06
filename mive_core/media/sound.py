"""The source's sound in an edited video: copied where the container takes it, else encoded as AAC, or Opus in WebM.

The picture is kept whatever happens to the sound.
"""

import heapq
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from .decode import video_stream

AAC_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 88_200, 96_000)  # per second
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # by number of channels


@dataclass(frozen=True)
class Fallback:
    """The codec for sound that a container does not hold as it is."""

    name: str
    encoder: str
    rates: tuple[int, ...]  # per second


AAC, OPUS = Fallback("AAC", "aac", AAC_RATES), Fallback("Opus", "libopus", (48_000,))

Timed = Iterator[tuple[Fraction, av.Packet]]  # by time, in seconds


def add_sound(video: Path, source: Path, name: Path) -> None:
    """Gives a silent video, in place, the source's first audio stream, cut off where the video ends. The two begin with the same frame.

    Without an audio stream nothing happens. Warns, and calls the video `name`, where sound had to be encoded, or to be left out because it can be
    neither copied nor decoded.
    """
    joined = video.with_stem(f"{video.stem}.sound")
    try:
        with av.open(str(source), metadata_errors="replace") as given, av.open(str(video)) as silent:
            if not given.streams.audio:
                return
            with av.open(str(joined), "w") as output:
                encoded = _join(given, silent, output, name.suffix.lower())
        os.replace(joined, video)
        if encoded:
            warnings.warn(f"{name}: the sound was encoded as {fallback(name.suffix).name}, since {name.suffix} does not hold {encoded}", stacklevel=2)
    except (av.FFmpegError, ValueError, NotImplementedError) as error:
        warnings.warn(f"{name}: written without the source's sound: {getattr(error, 'strerror', None) or error}", stacklevel=2)
    finally:
        joined.unlink(missing_ok=True)


def _join(given: av.container.InputContainer, silent: av.container.InputContainer, output: av.container.OutputContainer, suffix: str) -> str | None:
    """Muxes the pictures of one container and the sound of another. Returns the sound's codec if it had to be encoded as another one.

    Raises ValueError for sound that cannot be decoded.
    """
    sound, picture = given.streams.audio[0], video_stream(given)
    if picture is None:
        raise ValueError("it has no pictures to go with")
    if sound.codec_context is None or not sound.codec_context.sample_rate:
        raise ValueError("its codec is unknown or its header is damaged")
    start, end = _seconds(picture.start_time, picture.time_base), _seconds(silent.duration, Fraction(1, av.time_base))
    codec = sound.codec_context.name
    is_pcm = codec.startswith("pcm_")
    is_held = codec in output.supported_codecs and not (is_pcm and suffix == ".mp4")  # which few players play
    pictures = _pictures(silent, output.add_stream_from_template(silent.streams.video[0]))
    if is_held and not is_pcm:
        packets = _copied(given, sound, output.add_stream_from_template(sound), start, end)
    else:  # packets of PCM can be long, so it is cut by samples and encoded as what it was
        packets = _encoded(given, sound, _add_encoder(output, codec if is_held else None, sound, fallback(suffix)), start, end)
    num_packets = 0
    for _, packet in heapq.merge(pictures, packets, key=lambda timed: timed[0]):
        num_packets += packet.stream.type == "audio"
        output.mux(packet)
    if not num_packets:
        raise ValueError("none of it can be decoded")
    return None if is_held else codec


def _pictures(silent: av.container.InputContainer, stream: av.VideoStream) -> Timed:
    """All packets of a video. Matroska stores no decoding times, so the first packets get theirs from the first that has one."""
    waiting: list[av.Packet] = []
    for packet in silent.demux(silent.streams.video[0]):
        if packet.size:
            waiting.append(packet)
        if packet.size and packet.dts is None:
            continue
        for steps, early in enumerate(reversed(waiting)):
            early.dts = early.pts if packet.dts is None else packet.dts - steps * (packet.duration or 0)  # no packet of a frame or two has one
        for early in waiting:
            time = _seconds(early.dts, early.time_base)
            early.stream = stream
            yield time, early
        waiting = []


def _copied(given: av.container.InputContainer, sound: av.AudioStream, stream: av.AudioStream, start: Fraction, end: Fraction) -> Timed:
    """The packets that begin before the end, moved by -start; the first ones may only prime the decoder."""
    for packet in given.demux(sound):
        if packet.dts is None or packet.pts is None:
            continue
        time = _seconds(packet.pts, packet.time_base) - start
        if time >= end:
            break
        if start and time + _seconds(packet.duration, packet.time_base) <= 0:
            continue
        offset = round(start / packet.time_base)
        packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
        yield time, packet


def fallback(suffix: str) -> Fallback:
    """The codec that a container holds for sure."""
    return OPUS if suffix.lower() == ".webm" else AAC


def _add_encoder(output: av.container.OutputContainer, codec: str | None, sound: av.AudioStream, chosen: Fallback) -> av.AudioStream:
    """A stream of the sound's own codec, or, where that is None, of `chosen`."""
    rate, layout = sound.codec_context.sample_rate, sound.codec_context.layout
    if codec is not None:
        return output.add_stream(codec, rate=rate, layout=layout)  # type: ignore[return-value]  # a codec of sound
    rate = min(chosen.rates, key=lambda known: abs(known - rate))
    return output.add_stream(chosen.encoder, rate=rate, layout=LAYOUTS.get(layout.nb_channels, "stereo"))  # type: ignore[return-value]


def _encoded(given: av.container.InputContainer, sound: av.AudioStream, stream: av.AudioStream, start: Fraction, end: Fraction) -> Timed:
    """What can be decoded between start and start + end, encoded; packets that cannot are left out."""
    graph = av.filter.Graph()
    trim = graph.add("atrim", f"start={float(start)}:end={float(start + end)}")
    graph.link_nodes(graph.add_abuffer(template=sound), trim, graph.add("asetpts", f"PTS-{float(start)}/TB"), graph.add("abuffersink")).configure()
    for packet in given.demux(sound):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        try:
            for frame in frames:
                graph.push(frame)
                for trimmed in _pulled(graph):
                    yield from _with_times(stream.encode(trimmed))
        except av.EOFError:  # after the end
            break
    yield from _with_times(stream.encode())


def _pulled(graph: av.filter.Graph) -> Iterator[av.AudioFrame]:
    while True:
        try:
            yield graph.pull()  # type: ignore[misc]  # the graph has no video
        except (av.BlockingIOError, av.EOFError):
            return


def _with_times(packets: list[av.Packet]) -> Timed:
    return ((_seconds(packet.pts, packet.time_base), packet) for packet in packets)


def _seconds(value: int | None, time_base: Fraction | None) -> Fraction:
    return (value or 0) * (time_base or Fraction(0)) + Fraction(0)
