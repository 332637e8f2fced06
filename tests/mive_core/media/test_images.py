"""Images and animations of the kinds that people have, each made here and read back."""

import zlib

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mive_core.errors import UserError
from mive_core.media.images import IMAGE_SUFFIXES, read_image
from mive_core.media.video import read_clip, read_fps, stream_clip

COLOURS = np.array([[1.0, 0.5, 0.25], [0.0, 0.75, 1.0]], dtype=np.float32)


def pixels(height: int = 32, width: int = 48) -> np.ndarray:
    """(H, W, 3) in 0..1: two flat halves."""
    return COLOURS.repeat(width // 2, axis=0)[None].repeat(height, axis=0)


def save(path, array: np.ndarray, codec: str, pix_fmt: str):
    """One image by FFmpeg."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = array.shape[1], array.shape[0], pix_fmt
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(array, format=pix_fmt)), *stream.encode()]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix, codec", [(".tif", "tiff"), (".tiff", "tiff"), (".dpx", "dpx")])
def test_sixteen_bits_are_read(tmp_path, suffix, codec):
    path = save(tmp_path / f"a{suffix}", (pixels() * 65535).round().astype(np.uint16), codec, "rgb48le")
    assert np.abs(read_image(path).numpy() - pixels()).max() < 1e-4


@pytest.mark.parametrize("layout", ["rgb48be", "rgba64be", "gray16be"])
def test_png_keeps_sixteen_bits(tmp_path, layout):
    """PIL reads 16 bits of red, green and blue as 8."""
    array = (pixels() * 65535).round().astype(np.uint16)
    array = array[..., 0] if layout == "gray16be" else np.dstack([array, np.full(array.shape[:2], 65535, np.uint16)]) if "a" in layout[3:4] else array
    read = read_image(save(tmp_path / "a 100%d.png", array, "png", layout)).numpy()
    assert np.abs(read - (pixels() if layout != "gray16be" else pixels()[..., :1])).max() < 1e-5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_upright_too(tmp_path, orientation):
    """As PIL turns the picture in 8 bits."""
    array = (pixels() * 65535).round().astype(np.uint16)
    array[:8, :20] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight = Image.fromarray((array >> 8).astype(np.uint8))
    eight.save(tmp_path / "eight.png", exif=exif)
    path = save(tmp_path / "a.png", array, "png", "rgb48be")
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    data = path.read_bytes()
    path.write_bytes(data[:33] + (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:])
    deep, upright = read_image(path), read_image(tmp_path / "eight.png")
    assert deep.shape == upright.shape and (deep - upright).abs().max() < 1.01 / 255
    assert float(deep.sum()) == pytest.approx(array.sum() / 65535, rel=1e-4)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".png", ".webp"])
def test_eight_bits_are_read(tmp_path, suffix):
    Image.fromarray((pixels() * 255).round().astype(np.uint8)).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert np.abs(read_image(tmp_path / f"a{suffix}").numpy() - pixels()).max() < 0.5 / 255 + 1e-6


def test_exr_is_linear_light_and_says_so(tmp_path):
    linear = np.where(pixels() <= 0.04045, pixels() / 12.92, ((pixels() + 0.055) / 1.055) ** 2.4).astype(np.float32)
    linear[0, 0], linear[1, 0] = 7.0, np.nan
    path = save(tmp_path / "a.exr", linear, "exr", "gbrpf32le")
    with pytest.warns(UserWarning, match="EXR is taken for linear light of BT.709 primaries, and read with the sRGB curve"):
        read = read_image(path).numpy()
    assert (read[0, 0] > 0.999).all() and (read[1, 0] == 0).all()
    assert np.abs(read[2:] - pixels()[2:]).max() < 1e-3


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_folder_of_each_kind_is_a_clip(tmp_path, suffix):
    for index in range(3):
        array = np.full((32, 48, 3), 0.25 * index, dtype=np.float32)
        path = tmp_path / f"{index}{suffix}"
        if suffix == ".exr":
            save(path, array, "exr", "gbrpf32le")
        elif suffix == ".dpx":
            save(path, (array * 65535).astype(np.uint16), "dpx", "rgb48le")
        else:
            Image.fromarray((array * 255).round().astype(np.uint8)).save(path)
    if suffix == ".exr":
        with pytest.warns(UserWarning) as caught:
            frames = read_clip(tmp_path).frames
        assert len(caught) == 1  # once for the folder
    else:
        frames = read_clip(tmp_path).frames
    assert frames.shape == (3, 32, 48, 3) and (frames.mean(dim=(1, 2, 3)).diff() > 0.1).all()


@pytest.mark.parametrize("suffix", [".exr", ".dpx", ".tif", ".bmp"])
def test_a_damaged_image_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"no image at all, however hard one looks at it")
    with pytest.raises(UserError, match=rf"a\{suffix}"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".webp", ".png"])
def test_an_animation_is_a_clip(tmp_path, suffix):
    images = [Image.new("RGB", (48, 32), (60 * index, 0, 0)) for index in range(4)]
    path = tmp_path / f"a{suffix}"
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, **({"lossless": True} if suffix == ".webp" else {}))
    clip = read_clip(path)
    assert clip.fps == read_fps(path) == 12.5
    assert (clip.frames[:, 0, 0, 0] * 255).round().tolist() == [0, 60, 120, 180]
    assert torch.equal(torch.stack(list(stream_clip(path, num_frames=3))), clip.frames[:3])
    with pytest.raises(UserError, match="holds more than one image"):
        read_image(path)


def test_frames_of_an_animation_that_last_longer_are_repeated(tmp_path):
    images = [Image.new("RGB", (48, 32), (60 * index, 0, 0)) for index in range(4)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[40, 40, 120, 40], lossless=True)
    with pytest.warns(UserWarning, match="its frame rate varies; read at a constant 25 frames a second"):
        clip = read_clip(tmp_path / "a.webp")
    assert (clip.frames[:, 0, 0, 0] * 255).round().tolist() == [0, 60, 120, 120, 120, 180]


def test_a_frame_that_lasts_for_hours_is_refused(tmp_path):
    images = [Image.new("RGB", (48, 32), (60 * index, 0, 0)) for index in range(3)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=[40, 40, 16_000_000], lossless=True)
    with pytest.raises(UserError, match=r"lasts so long.*got 1.6e\+04 s, where most last 0.04 s"):
        read_clip(tmp_path / "a.webp")
    assert len(read_clip(tmp_path / "a.webp", num_frames=5).frames) == 5


def test_a_phones_jpeg_with_a_second_view_is_its_first(tmp_path):
    Image.fromarray((pixels() * 255).astype(np.uint8)).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))], quality=95
    )
    assert np.abs(read_image(tmp_path / "a.jpg").numpy()[4:-4, 4:20] - COLOURS[0]).max() < 0.03
