import os
import resource
import signal

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mive_core.errors import UserError
from mive_core.media.images import read_image, write_frames
from mive_core.media.video import read_clip, write_video
from mive_core.types import Clip


def moving_square(num_frames: int = 9, height: int = 48, width: int = 64) -> torch.Tensor:
    """(F, H, W, 3): a bright square that slides over a dark gradient."""
    frames = torch.linspace(0.1, 0.4, width).expand(num_frames, height, width)[..., None].repeat(1, 1, 1, 3)
    for index in range(num_frames):
        frames[index, 16:32, 2 * index : 2 * index + 16] = torch.tensor([0.9, 0.5, 0.2])
    return frames


def test_a_video_comes_back_as_it_was_written(tmp_path):
    clip = Clip(moving_square(), 12.5)
    path = write_video(tmp_path / "clip.mp4", clip)
    back = read_clip(path)
    assert back.frames.shape == clip.frames.shape and back.frames.dtype == torch.float32
    assert back.fps == 12.5
    assert (back.frames - clip.frames).square().mean() < 4e-4  # 34 dB: 4:2:0 halves the colour of sharp edges
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".MP4"])
def test_containers(tmp_path, suffix):
    path = write_video(tmp_path / f"clip{suffix}", Clip(moving_square(5), 8.0))
    assert read_clip(path).frames.shape == (5, 48, 64, 3)


def test_one_frame_is_a_video(tmp_path):
    assert read_clip(write_video(tmp_path / "a.mp4", Clip(moving_square(1), 8.0))).frames.shape == (1, 48, 64, 3)


def test_colours_are_kept(tmp_path):
    """Flat saturated colours: a wrong matrix (601 for 709) or range shifts them by 0.03 and more."""
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.9], [1, 1, 1], [0, 0, 0], [0.9, 0.9, 0.1]])
    frames = colours.repeat_interleave(16, 0).expand(5, 32, 96, 3)
    back = read_clip(write_video(tmp_path / "a.mp4", Clip(frames, 8.0))).frames
    centres = back[2, 16, 8::16]
    assert (centres - colours).abs().max() < 0.02


def test_only_the_frames_asked_for_are_read(tmp_path):
    path = write_video(tmp_path / "a.mp4", Clip(moving_square(), 8.0))
    assert torch.equal(read_clip(path, num_frames=5).frames, read_clip(path).frames[:5])


def test_frames_are_read_in_natural_order(tmp_path):
    for index in (1, 2, 10):
        Image.new("RGB", (32, 32), (index * 20, 0, 0)).save(tmp_path / f"frame{index}.png")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    clip = read_clip(tmp_path, fps=5.0)
    assert (clip.frames[:, 0, 0, 0] * 255).round().tolist() == [20, 40, 200]
    assert clip.fps == 5.0


def test_frames_round_trip_without_loss(tmp_path):
    frames = (moving_square() * 255).round() / 255
    write_frames(tmp_path / "frames", frames)
    assert torch.equal(read_clip(tmp_path / "frames").frames, frames)


def test_a_folder_needs_frames_of_one_size(tmp_path):
    with pytest.raises(UserError, match="holds no frames"):
        read_clip(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png.*differ in size; got 48x32; expected 32x32"):
        read_clip(tmp_path)


def test_rgba_is_composited_over_black_with_a_warning(tmp_path):
    Image.new("RGBA", (32, 32), (200, 100, 0, 128)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="over black"):
        image = read_image(tmp_path / "a.png")
    assert torch.allclose(image[0, 0], torch.tensor([200, 100, 0]) / 255 * 128 / 255)


def test_opaque_alpha_is_dropped_in_silence(tmp_path, recwarn):
    Image.new("RGBA", (32, 32), (200, 100, 0, 255)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (32, 32, 3)
    assert not recwarn


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("L", (32, 32), 51), 0.2),
        (Image.new("1", (32, 32), 1), 1.0),
        (Image.fromarray(np.full((32, 32), 13107, np.uint16)), 0.2),
        (Image.new("P", (32, 32), 0), 0.0),
    ],
)
def test_gray_and_palette_images_are_expanded(tmp_path, image, expected):
    image.save(tmp_path / "a.png")
    assert torch.allclose(read_image(tmp_path / "a.png"), torch.full((32, 32, 3), expected))


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise to be upright
    picture = Image.new("RGB", (48, 32))
    picture.paste((255, 255, 255), (0, 0, 24, 32))
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (48, 32, 3)
    assert image[4].mean() > 0.9 and image[-4].mean() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (20000, 16), (16, 15)])
def test_image_sides_have_limits(tmp_path, size):
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=f"got {size[0]}x{size[1]}; expected sides of 16 to 16384 px"):
        read_image(tmp_path / "a.png")


def test_an_image_too_large_to_hold_is_refused_before_it_is_decoded(tmp_path):
    Image.new("1", (16384, 16384)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="too large"):
        read_image(tmp_path / "a.png")


def test_more_than_one_reference_is_refused(tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="more than one image"):
        read_image(tmp_path / "a.webp")
    with pytest.raises(UserError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("keep", [0, 10, 200, 700])
def test_truncated_images(tmp_path, suffix, keep):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"a\{suffix}'.*{keep} bytes"):
        read_image(path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML or XML page of 44 bytes"),
        (b"PK\x03\x04 and so on", "a zip archive of 14 bytes"),
        (bytes(range(256)) * 8, "2048 bytes"),
    ],
)
def test_what_is_no_video_is_named(tmp_path, content, says):
    for name, read in (("a.mp4", read_clip), ("a.png", read_image)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*{says}"):
            read(tmp_path / name)


def test_a_video_cut_short_is_refused(tmp_path):
    """With its index at the front a cut file still opens; it used to give fewer frames in silence."""
    whole = write_video(tmp_path / "whole.mp4", Clip(torch.rand(33, 64, 64, 3, generator=torch.Generator().manual_seed(0)), 8.0))
    front = tmp_path / "front.mp4"
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert len(read_clip(front).frames) == 33
    for path in (whole, front):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        with pytest.raises(UserError, match=rf"{path.name}.*{len(data) * 2 // 3} bytes"):
            read_clip(path)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="no video stream"):
        read_clip(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "path, says",
    [
        ("missing.mp4", "no such file or folder.*check the spelling"),
        ("missing/clip.mp4", "the folder 'missing' does not exist either"),
        ("C:\\clips\\clip.mp4", "looks like a Windows path"),
        ("a\0b.mp4", "NUL"),
        ("\ud800.mp4", "lone surrogate"),
        ("", "empty"),
        ("x" * 5000 + ".mp4", "cannot be opened"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    for read in (read_clip, read_image):
        with pytest.raises(UserError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, says",
    [
        ("missing/clip.mp4", "its folder does not exist; create"),
        ("clip.avi", r"unsupported file type; got '\.avi'; expected \.gif or \.mkv or \.mov or \.mp4 or \.webm"),
        ("", "the folder is not empty"),
        ("C:\\clip.mp4", "backslash"),
        ("a\0.mp4", "NUL"),
        ("folder.mp4", "is a folder"),
        ("x" * 300 + ".mp4", "name too long"),
    ],
)
def test_outputs_that_cannot_be(tmp_path, name, says):
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=f"(?i){says}"):
        write_video(f"{tmp_path}/{name}", Clip(moving_square(), 8.0))
    assert os.listdir(tmp_path) == ["folder.mp4"]


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_a_video_needs_a_frame_rate(tmp_path, fps):
    with pytest.raises(UserError, match="frame rate"):
        write_video(tmp_path / "a.mp4", Clip(moving_square(), fps))
    assert not os.listdir(tmp_path)


def test_not_finite_pixels_never_become_a_black_video(tmp_path):
    frames = moving_square()
    frames[3, 5, 5, 1] = float("nan")
    (tmp_path / "a.mp4").write_bytes(b"what stood here before")
    with pytest.raises(UserError, match="got frame 3"):
        write_video(tmp_path / "a.mp4", Clip(frames, 8.0))
    assert (tmp_path / "a.mp4").read_bytes() == b"what stood here before"
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_full_disk_leaves_nothing(tmp_path):
    frames = torch.rand(9, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    (tmp_path / "a.mp4").write_bytes(b"before")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match="check space and permissions"):
            write_video(tmp_path / "a.mp4", Clip(frames, 8.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "a.mp4").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["a.mp4"]
