"""The formats that an edit is written in, each read back."""

from pathlib import Path

import av
import pytest
import torch

from mive_core.errors import UserError
from mive_core.media.encode import FORMATS, Encoding
from mive_core.media.video import read_clip, write_stream, write_video
from mive_core.types import Clip

FOOTAGE = Path(__file__).parents[3] / "mive_core" / "assets" / "samples" / "bigbuckbunny_33f.mp4"


@pytest.fixture(scope="module")
def clip():
    return read_clip(FOOTAGE, num_frames=5)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean()))


@pytest.mark.parametrize(
    "name, codec, stream, least",
    [
        ("a.mp4", "", ("h264", "yuv420p"), 36),
        ("a.mkv", "ffv1", ("ffv1", "bgr0"), 99),
        ("a.mov", "prores", ("prores", "yuv422p10le"), 40),
        ("a.mov", "prores4444", ("prores", "yuv444p12le"), 44),
        ("a.webm", "", ("vp9", "yuv420p"), 34),
        ("a.webm", "av1", ("libdav1d", "yuv420p"), 34),
        ("a.gif", "", ("gif", "bgra"), 28),
    ],
)
def test_formats_come_back(tmp_path, clip, name, codec, stream, least):
    path = write_video(tmp_path / name, clip, encoding=Encoding(codec))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == stream
        if "yuv" in stream[1] and codec != "av1":
            assert context.colorspace == 1
    back = read_clip(path)
    assert back.frames.shape == clip.frames.shape and abs(back.fps - clip.fps) < 1.1  # GIF counts in hundredths of a second
    assert psnr(back.frames, clip.frames) > least
    assert ((back.frames - clip.frames).mean(dim=(0, 1, 2)) * 255).abs().max() < (1.5 if name == "a.gif" else 0.6)


def test_ffv1_loses_nothing(tmp_path, clip):
    frames = (clip.frames * 255).round() / 255
    assert torch.equal(read_clip(write_video(tmp_path / "a.mkv", Clip(frames, 24.0), encoding=Encoding("ffv1"))).frames, frames)


def test_a_path_without_a_suffix_becomes_a_folder_of_png(tmp_path, clip):
    folder = write_stream(tmp_path / "frames", iter(clip.frames), (192, 112), 24.0)
    assert sorted(path.name for path in folder.iterdir()) == [f"{index:05d}.png" for index in range(5)]
    assert (read_clip(folder).frames - clip.frames).abs().max() < 0.5 / 255 + 1e-6
    with pytest.raises(UserError, match="the folder is not empty"):
        write_video(folder, clip)
    with pytest.raises(UserError, match="has no codec and no crf"):
        write_video(tmp_path / "others", clip, encoding=Encoding(crf=3))


@pytest.mark.parametrize("name, codec", [("a.mp4", ""), ("a.webm", "vp9"), ("b.webm", "av1")])
def test_a_larger_crf_makes_a_smaller_file(tmp_path, clip, name, codec):
    small, large = (write_video(tmp_path / f"{crf}{name}", clip, encoding=Encoding(codec, crf)).stat().st_size for crf in (45, 5))
    assert large > 2 * small


@pytest.mark.parametrize(
    "name, encoding, says",
    [
        ("a.mp4", Encoding("ffv1"), r"\.mp4 does not hold ffv1 here.*expected \.mkv"),
        ("a.mov", Encoding("prores", 12), "prores takes no such crf; got 12; expected none"),
        ("a.mp4", Encoding("", 52), "h264 takes no such crf; got 52; expected 0 to 51"),
        ("a.mp4", Encoding("mpeg1"), f"unknown codec; got 'mpeg1'; expected {', '.join(FORMATS)}"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, clip, name, encoding, says):
    with pytest.raises(UserError, match=says):
        write_video(tmp_path / name, clip, encoding=encoding)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec, suffix", [("h264", ".mp4"), ("prores", ".mov"), ("ffv1", ".mkv"), ("vp9", ".webm"), ("av1", ".webm"), ("gif", ".gif")])
def test_odd_sizes_are_written(tmp_path, clip, codec, suffix):
    odd = clip.frames[:, :-1, :-1]
    path = write_stream(tmp_path / f"a{suffix}", iter(odd), (191, 111), 24.0, encoding=Encoding(codec))
    assert read_clip(path).frames.shape == odd.shape


def test_a_whole_clip_of_odd_size_goes_by_its_codec(tmp_path, clip):
    """.mkv is H.264 by default, and FFV1 is not."""
    odd = Clip((clip.frames[:, :-1, :-1] * 255).round() / 255, 24.0)
    assert torch.equal(read_clip(write_video(tmp_path / "a.mkv", odd, encoding=Encoding("ffv1"))).frames, odd.frames)
    with pytest.raises(UserError, match="needs even sizes; got 191x111"):
        write_video(tmp_path / "b.mkv", odd)
