"""The source's sound in a written video: what the container takes is copied, what it does not is encoded, and what is broken never costs the picture."""

import math
import os
import warnings

import av
import numpy as np
import pytest
import torch

from mive_core.media.images import write_frames
from mive_core.media.video import read_clip, write_stream, write_video
from mive_core.types import Clip

RATE, FPS = 48_000, 8.0
FRAMES = torch.rand(12, 32, 48, 3, generator=torch.Generator().manual_seed(0))  # 1.5 seconds


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    """(2, N) float32: 440 Hz, louder in every second."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.2 * (1 + np.floor(time)) * np.sin(2 * np.pi * 440 * time)] * 2).astype(np.float32)


def make_source(path, codec: str | None, *, seconds: float = 3.0, rate: int = RATE, pictures_from: float = 0.0):
    """A file of the given sound, with a picture that begins at a time of its own."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout="stereo", bit_rate=128_000) if codec else None
        if audio:
            for start in range(0, round(seconds * rate), 1000):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(tone(seconds, rate)[:, start : start + 1000]), format="fltp", layout="stereo")
                frame.sample_rate, frame.pts = rate, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
        for index in range(round((seconds - pictures_from) * 8)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * index % 255, np.uint8), format="rgb24")
            frame.pts = index + round(8 * pictures_from)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return path


def packets_of(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.audio[0]) if packet.size]


def sound_of(path) -> tuple[str, np.ndarray]:
    """Name of the codec, and (channels, N) samples."""
    with av.open(str(path)) as container:
        resampler = av.AudioResampler("fltp", "stereo", RATE)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        return container.streams.audio[0].codec_context.name, np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def has_sound(path) -> bool:
    with av.open(str(path)) as container:
        return bool(container.streams.audio)


def pitch(samples: np.ndarray) -> float:
    """The strongest frequency in Hz."""
    return float(np.abs(np.fft.rfft(samples[0])).argmax() * RATE / samples.shape[1])


@pytest.mark.parametrize(
    "source, codec, target",
    [("a.mp4", "aac", "out.mp4"), ("a.mp4", "aac", "out.mkv"), ("a.mkv", "libopus", "out.mkv"), ("a.mkv", "libopus", "out.mp4"), ("a.mov", "aac", "out.mov")],
)
def test_sound_is_copied_up_to_the_videos_end(tmp_path, recwarn, source, codec, target):
    make_source(tmp_path / source, codec)
    path = write_video(tmp_path / target, Clip(FRAMES, FPS), sound=tmp_path / source)
    given, got = packets_of(tmp_path / source), packets_of(path)
    assert got == given[: len(got)] and 0 < len(got) < 0.6 * len(given)
    name, samples = sound_of(path)
    assert name == codec.removeprefix("lib") and samples.shape[1] / RATE == pytest.approx(1.5, abs=0.06) and pitch(samples) == pytest.approx(440, abs=2)
    back = read_clip(path)
    assert back.frames.shape == FRAMES.shape and back.fps == FPS
    assert not recwarn and sorted(os.listdir(tmp_path)) == sorted({source, target})


def test_a_source_without_sound_gives_a_silent_video_without_a_word(tmp_path, recwarn):
    make_source(tmp_path / "a.mp4", None)
    write_frames(tmp_path / "frames", FRAMES)
    for number, source in enumerate(("a.mp4", "frames", "frames/00000.png")):
        path = write_video(tmp_path / f"out{number}.mp4", Clip(FRAMES, FPS), sound=tmp_path / source)
        assert not has_sound(path)
    assert not recwarn


def test_pcm_stays_pcm_to_the_sample_in_mov_and_becomes_aac_in_mp4(tmp_path, recwarn):
    make_source(tmp_path / "a.mov", "pcm_s16le")
    name, samples = sound_of(write_video(tmp_path / "out.mov", Clip(FRAMES, FPS), sound=tmp_path / "a.mov"))
    assert name == "pcm_s16le" and not recwarn
    assert np.array_equal(samples, sound_of(tmp_path / "a.mov")[1][:, : round(1.5 * RATE)])
    with pytest.warns(UserWarning, match=r"out\.mp4: the sound was encoded as AAC, since \.mp4 does not hold pcm_s16le"):
        path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=tmp_path / "a.mov")
    name, samples = sound_of(path)
    assert name == "aac" and samples.shape[1] / RATE == pytest.approx(1.5, abs=0.05) and pitch(samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("codec", ["aac", "libopus"])
def test_webm_gets_opus(tmp_path, codec):
    """Opus is copied; AAC, which WebM does not hold, is encoded as Opus, with a warning."""
    source = make_source(tmp_path / "source.mkv", codec, rate=48_000)
    clip = read_clip(source, num_frames=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = write_video(tmp_path / "edited.webm", clip, sound=source)
    assert [str(warning.message).endswith("the sound was encoded as Opus, since .webm does not hold aac") for warning in caught] == [True] * (codec == "aac")
    name, samples = sound_of(path)
    assert name in ("opus", "libopus") and abs(samples.shape[1] / RATE - 2) < 0.1
    assert np.sqrt((samples[:, RATE // 2 :] ** 2).mean()) > 0.1


def test_a_gif_has_no_sound_and_a_folder_of_frames_neither(tmp_path):
    source = make_source(tmp_path / "source.mkv", "aac")
    clip = read_clip(source, num_frames=4)
    assert read_clip(write_video(tmp_path / "a.gif", clip, sound=source)).frames.shape[0] == 4
    assert len(list(write_video(tmp_path / "frames", clip, sound=source).iterdir())) == 4


def test_a_rate_that_aac_lacks_is_resampled(tmp_path):
    make_source(tmp_path / "a.mkv", "pcm_u8", rate=44_056)
    with pytest.warns(UserWarning, match="was encoded as AAC"):
        path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=tmp_path / "a.mkv")
    with av.open(str(path)) as container:
        assert container.streams.audio[0].rate == 44_100
    assert pitch(sound_of(path)[1]) == pytest.approx(440, abs=2)


@pytest.mark.parametrize("codec, source, target", [("aac", "a.mkv", "out.mp4"), ("pcm_s16le", "a.mov", "out.mov")])
def test_sound_before_the_first_frame_is_left_out(tmp_path, codec, source, target):
    """The tone doubles in loudness after a second, where the picture begins."""
    make_source(tmp_path / source, codec, pictures_from=1.0)
    _, samples = sound_of(write_video(tmp_path / target, Clip(FRAMES, FPS), sound=tmp_path / source))
    assert samples.shape[1] / RATE == pytest.approx(1.5, abs=0.06)
    loudness = [math.sqrt(2 * np.square(samples[0, round(a * RATE) : round(b * RATE)]).mean()) for a, b in ((0.1, 0.9), (1.1, 1.4))]
    assert loudness == pytest.approx([0.4, 0.6], abs=0.03)


def test_sound_that_is_shorter_than_the_video_stays_short(tmp_path):
    make_source(tmp_path / "a.mp4", "aac", seconds=0.5)
    path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=tmp_path / "a.mp4")
    assert sound_of(path)[1].shape[1] / RATE == pytest.approx(0.5, abs=0.05) and len(read_clip(path).frames) == 12


def test_frames_one_by_one_get_their_sound_too(tmp_path):
    make_source(tmp_path / "a.mp4", "aac")
    path = write_stream(tmp_path / "out.mp4", iter(FRAMES), (48, 32), 29.97, sound=tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(29.97, abs=1e-3)
    assert sound_of(path)[1].shape[1] / RATE == pytest.approx(12 / 29.97, abs=0.06)


def break_sound(path, byte: bytes):
    """Overwrites the data of every sound packet. Returns the path."""
    data, position = bytearray(path.read_bytes()), 0
    for packet in packets_of(path):
        position = data.find(packet, position)
        data[position : position + len(packet)] = byte * len(packet)
    path.write_bytes(bytes(data))
    return path


def test_sound_that_cannot_be_decoded_is_left_out_with_a_warning(tmp_path):
    break_sound(make_source(tmp_path / "a.avi", "wmav2"), b"\xff")
    with pytest.warns(UserWarning) as caught:
        path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=tmp_path / "a.avi")
    assert [str(warning.message) for warning in caught] == [f"{path}: written without the source's sound: none of it can be decoded"]
    assert not has_sound(path) and read_clip(path).frames.shape == FRAMES.shape
    assert sorted(os.listdir(tmp_path)) == ["a.avi", "out.mp4"]


def test_sound_of_an_unknown_codec_is_left_out_with_a_warning(tmp_path):
    source = make_source(tmp_path / "a.mkv", "ac3")
    source.write_bytes(source.read_bytes().replace(b"A_AC3", b"A_XY3"))
    with pytest.warns(UserWarning, match=r"out\.mp4: written without the source's sound: its codec is unknown"):
        path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=source)
    assert not has_sound(path) and read_clip(path).frames.shape == FRAMES.shape


def test_broken_sound_that_need_not_be_decoded_is_copied_as_it_is(tmp_path):
    break_sound(make_source(tmp_path / "a.mp4", "aac"), b"\x5a")
    path = write_video(tmp_path / "out.mp4", Clip(FRAMES, FPS), sound=tmp_path / "a.mp4")
    assert packets_of(path) == packets_of(tmp_path / "a.mp4")[: len(packets_of(path))] and read_clip(path).frames.shape == FRAMES.shape


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("target", ["out.mkv", "out.mp4"])
def test_a_frame_or_two_with_sound(tmp_path, num_frames, target):
    """Matroska keeps no decoding times, which a copy of its packets needs."""
    make_source(tmp_path / "a.mp4", "aac")
    path = write_video(tmp_path / target, Clip(FRAMES[:num_frames], FPS), sound=tmp_path / "a.mp4")
    assert len(read_clip(path).frames) == num_frames and has_sound(path)
