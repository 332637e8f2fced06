"""Target and mask beside the source: what differs in rate is resampled, what differs in length or shape is refused."""

import pytest
import torch

from mive_core.data.manifest import ManifestEntry, load_entry
from mive_core.errors import UserError
from mive_core.media.images import write_frames
from mive_core.media.video import read_num_frames, write_video
from mive_core.types import Clip


def ramp(num_frames: int, rate: float, height: int = 32, width: int = 48) -> torch.Tensor:
    """A picture that grows brighter with time, by 0.1 a second."""
    return (0.1 + 0.1 * torch.arange(num_frames) / rate)[:, None, None, None].expand(num_frames, height, width, 3)


def video(path, num_frames: int, rate: float, height: int = 32, width: int = 48):
    return write_video(path, Clip(ramp(num_frames, rate, height, width), rate))


def level(frames: torch.Tensor) -> torch.Tensor:
    return frames.float().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("rate, suffix", [(12.0, ".mp4"), (48.0, ".mp4"), (16.0, ".mp4"), (30.0, ".mkv"), (24000 / 1001, ".mp4")])
@pytest.mark.parametrize("num_frames", [None, 33])
def test_the_frame_on_screen_at_the_sources_time_is_taken(tmp_path, rate, suffix, num_frames):
    source = video(tmp_path / "source.mp4", 49, 24.0)
    target = video(tmp_path / f"target{suffix}", round(49 / 24 * rate), rate)
    mask = write_video(tmp_path / "mask.mp4", Clip((torch.arange(25) >= 12)[:, None, None, None].expand(25, 32, 48, 3).float(), 12.0))
    pair = load_entry(ManifestEntry(source, None, "x", target, mask), num_frames=num_frames)
    count = num_frames or 49
    expected = ramp(count, 24.0)
    late = level(expected) - level(pair.target)
    assert pair.target.shape == pair.request.source.frames.shape == (count, 32, 48, 3)
    assert late.min() > -0.006 and late.max() < 0.1 / rate + 0.006  # what is on screen began at most one frame of the target ago
    assert pair.mask.any(dim=(1, 2)).tolist() == [i >= 24 for i in range(count)]


def test_folders_of_frames_have_no_rate(tmp_path):
    source = video(tmp_path / "source.mp4", 5, 24.0)
    write_frames(tmp_path / "target", ramp(5, 12.0))
    pair = load_entry(ManifestEntry(source, None, "x", tmp_path / "target", fps=12.0))
    assert torch.allclose(level(pair.target), level(ramp(5, 12.0)), atol=0.01)


@pytest.mark.parametrize("num_frames", [None, 9])
@pytest.mark.parametrize(
    "length, rate, said",
    [
        (49, 12.0, "longer than the source; got 49 frames at 12 a second, 4.08 s; expected 2.04 s at 24 .if their frames belong together one by one"),
        (10, 12.0, "shorter than the source; got 10 frames at 12 a second"),
        (120, 24.0, "longer than the source"),
        (40, 24.0, "shorter than the source"),
    ],
)
def test_another_length_is_refused_even_where_a_part_is_used(tmp_path, num_frames, length, rate, said):
    source, target = video(tmp_path / "source.mp4", 49, 24.0), video(tmp_path / "target.mp4", length, rate)
    with pytest.raises(UserError, match=f"target.mp4'.*{said}"):
        load_entry(ManifestEntry(source, None, "x", target), num_frames=num_frames)
    write_frames(tmp_path / "reference", ramp(1, 24.0))
    mask = ManifestEntry(source, tmp_path / "reference" / "00000.png", "x", None, target)
    with pytest.raises(UserError, match="the mask is"):
        load_entry(mask, num_frames=num_frames)


@pytest.mark.parametrize("width, height, fits", [(64, 64, False), (96, 64, True), (100, 64, False), (98, 64, True), (192, 128, True)])
def test_another_shape_is_refused_and_another_size_is_not(tmp_path, width, height, fits):
    source, target = video(tmp_path / "source.mp4", 5, 24.0, 64, 96), video(tmp_path / "target.mp4", 5, 24.0, height, width)
    write_frames(tmp_path / "reference", ramp(1, 24.0, 64, 96))
    for entry in (ManifestEntry(source, None, "x", target), ManifestEntry(source, tmp_path / "reference" / "00000.png", "x", None, target)):
        if fits:
            load_entry(entry, (96, 64))
        else:
            with pytest.raises(UserError, match=f"its shape is not the source's; got {width}x{height}; expected the shape of 96x64"):
                load_entry(entry, (96, 64))


def test_the_number_of_frames_is_known_without_reading_them(tmp_path):
    for suffix in (".mp4", ".mkv"):
        assert read_num_frames(video(tmp_path / f"clip{suffix}", 17, 24.0)) == 17
    write_frames(tmp_path / "frames", ramp(3, 24.0))
    assert read_num_frames(tmp_path / "frames") == 3 and read_num_frames(tmp_path / "frames" / "00000.png") == 1
