"""Video as people have it is read as a player shows it. Every file is made here."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mive_core.media.decode import read_timing
from mive_core.media.sound import add_sound
from mive_core.media.tone_map import light_to_pq
from mive_core.media.video import read_clip, read_fps, read_num_frames, stream_clip, write_video
from mive_core.types import Clip

FOOTAGE = Path(__file__).parents[3] / "mive_core" / "assets" / "samples" / "bigbuckbunny_33f.mp4"


def write(path, planes, pix_fmt, *, codec="libx264", rate=24, times=None, time_base=None, options=None, ratio=None, tags=(), filters=()):
    """Encodes arrays of `pix_fmt` as they are, with `tags` (primaries, transfer, matrix) and frame `times` in units of `time_base`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "4", **(options or {})} if codec == "libx264" else options or {})
        first = av.VideoFrame.from_ndarray(planes[0], format=pix_fmt)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, pix_fmt
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if tags:
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace = tags
        if ratio is not None:
            stream.codec_context.sample_aspect_ratio = ratio
        for index, plane in enumerate(planes):
            frame = av.VideoFrame.from_ndarray(plane, format=pix_fmt)
            frame.pts, frame.time_base = (index if times is None else times[index]), time_base or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def flat_yuv(y: int, u: int, v: int, height: int, width: int) -> np.ndarray:
    """One frame of yuv420p, (3/2 H, W)."""
    half = height * width // 4
    return np.concatenate([np.full(height * width, y), np.full(half, u), np.full(half, v)]).astype(np.uint8).reshape(height * 3 // 2, width)


def counting(num_frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Frames whose luma tells their number: 20, 30, 40, ..."""
    return [flat_yuv(20 + 10 * index, 128, 128, height, width) for index in range(num_frames)]


def shown(clip: Clip) -> list[int]:
    """The numbers of `counting`'s frames, in the order they are read."""
    return [round((value * 219 + 16 - 20) / 10) for value in clip.frames.mean(dim=(1, 2, 3)).tolist()]


def test_ten_rounds_of_reading_and_writing_neither_darken_nor_blur(tmp_path):
    """Was -10, -12, -10 levels and 26 dB."""
    first = clip = read_clip(FOOTAGE, num_frames=9)
    for _ in range(10):
        clip = read_clip(write_video(tmp_path / "round.mp4", clip))
    error = (clip.frames - first.frames) * 255
    assert error.mean(dim=(0, 1, 2)).abs().max() < 0.3
    assert 10 * torch.log10(255**2 / error.square().mean()) > 34


@pytest.mark.parametrize(
    "height, matrix",
    [(480, ((1.402, 0.344136, 0.714136, 1.772))), (720, ((1.5748, 0.187324, 0.468124, 1.8556)))],  # R from V, G from U, G from V, B from U
)
def test_untagged_video_is_read_by_its_height(tmp_path, height, matrix):
    """BT.601 below 720 lines, BT.709 from there on."""
    y, u, v = 120, 90, 170
    path = write(tmp_path / "a.mp4", [flat_yuv(y, u, v, height, 640)] * 2, "yuv420p")
    luma, blue, red = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    expected = torch.tensor([luma + matrix[0] * red, luma - matrix[1] * blue - matrix[2] * red, luma + matrix[3] * blue])
    assert (read_clip(path).frames[0, height // 2, 320] - expected).abs().max() < 1.5 / 255


def test_a_tag_outweighs_the_height(tmp_path):
    frame = flat_yuv(120, 90, 170, 96, 96)
    tagged = read_clip(write(tmp_path / "tagged.mp4", [frame] * 2, "yuv420p", tags=(1, 1, 1))).frames[0, 48, 48]
    untagged = read_clip(write(tmp_path / "untagged.mp4", [frame] * 2, "yuv420p")).frames[0, 48, 48]
    assert (tagged[1] - untagged[1]).abs() > 4 / 255


def hdr_frame(light: np.ndarray, transfer: int) -> np.ndarray:
    """Gray light (H, W) in cd/m2 -> yuv420p10le of PQ or HLG."""
    if transfer == 16:
        signal = light_to_pq(light)
    else:  # HLG of a display of 1000 cd/m2: gray's scene light is (L / 1000) to the power 1 / 1.2
        scene = (light / 1000) ** (1 / 1.2)
        signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-6)) + 0.55991073)
    luma = np.round((signal * 219 + 16) * 4)
    chroma = np.full((light.shape[0] // 2, light.shape[1]), 512)
    return np.concatenate([luma, chroma]).astype(np.uint16)


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_mapped_to_a_standard_display_with_a_warning(tmp_path, transfer, name):
    """Gray up to 90 cd/m2 keeps its light; 1000 becomes white, 203 stays below it. Read as if SDR, 10 cd/m2 of PQ would be 0.30 and not 0.29, 90 be 0.49."""
    steps = np.array([1.0, 10, 50, 90, 203, 500, 1000])
    frame = hdr_frame(np.repeat(steps, 32)[None].repeat(64, axis=0), transfer)
    path = write(tmp_path / "hdr.mp4", [frame] * 2, "yuv420p10le", tags=(9, transfer, 9))
    with pytest.warns(UserWarning, match=rf"HDR \({name}\), mapped to the range of a standard display \(BT.2390\)"):
        values = read_clip(path).frames[0, 32, 16::32]
    assert (values - values.mean(dim=1, keepdim=True)).abs().max() < 0.01  # gray stays gray
    gray = values.mean(dim=1)
    assert (gray[:4] - torch.tensor((steps[:4] / 203) ** (1 / 2.4)).float()).abs().max() < 0.02
    assert (gray.diff() > 0.005).all() and gray[4] < 0.95 and gray[6] > 0.98


def test_pixels_that_are_not_square_are_read_square(tmp_path):
    path = write(tmp_path / "dv.mp4", counting(2, 48, 72), "yuv420p", ratio=Fraction(16, 15))
    with pytest.warns(UserWarning, match="pixels are not square; 72x48 is read as 76x48"):
        assert read_clip(path).frames.shape == (2, 48, 76, 3)
    path = write(tmp_path / "tall.mp4", counting(2, 48, 64), "yuv420p", ratio=Fraction(1, 2))
    with pytest.warns(UserWarning, match="read as 64x96"):
        assert next(stream_clip(path)).shape == (96, 64, 3)


def test_a_varying_rate_is_read_at_a_constant_one(tmp_path):
    """As a phone records in the dark: 30 a second, and some frames late. By times 0, 1, 2, 5, 6, 7, 9 of 1/30 s."""
    times = [1000 * t for t in (0, 1, 2, 5, 6, 7, 9)]
    path = write(tmp_path / "phone.mp4", counting(7), "yuv420p", times=times, time_base=Fraction(1, 30_000), options={"bf": "0"})
    with pytest.warns(UserWarning, match="its frame rate varies; read at a constant 30 frames a second"):
        clip = read_clip(path)
    assert clip.fps == read_fps(path) == 30 and len(clip.frames) == read_num_frames(path) == 10
    assert shown(clip)[:10] == [0, 1, 2, 2, 2, 3, 4, 5, 5, 6]
    with pytest.warns(UserWarning):
        assert shown(read_clip(path, num_frames=4)) == [0, 1, 2, 2]


def telecined(path, num_frames: int):
    """MPEG-2 as a DVD of a film holds it: progressive frames whose flags ask for two and for three fields in turn."""
    options = {"flags": "+ilme+ildct", "bf": "0"}
    write(path.with_suffix(".m2v"), counting(num_frames), "yuv420p", codec="mpeg2video", rate=Fraction(30_000, 1001), options=options)
    data, at, picture = bytearray(path.with_suffix(".m2v").read_bytes()), 0, 0
    while (at := data.find(b"\0\0\1\xb5", at)) >= 0:
        at += 4
        if data[at] >> 4 == 8:  # a picture coding extension (ISO/IEC 13818-2, 6.2.3.1)
            top_first, repeat = ((1, 1), (0, 0), (0, 1), (1, 0))[picture % 4]
            data[at + 3] = data[at + 3] & 0x7C | top_first << 7 | repeat << 1 | 1
            data[at + 4] |= 0x80  # a progressive frame
            picture += 1
    path.with_suffix(".m2v").write_bytes(data)
    with av.open(str(path.with_suffix(".m2v"))) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
@pytest.mark.parametrize("num_frames", [20, 22])
def test_film_in_soft_telecine_is_read_at_its_own_rate(tmp_path, suffix, num_frames):
    """Read at 30 a second, every fourth frame was there twice."""
    path = telecined(tmp_path / f"dvd{suffix}", num_frames)
    with pytest.warns(UserWarning, match=r"film in 2:3 pulldown \(soft telecine\); read at a constant 23.98 frames a second"):
        clip = read_clip(path)
    assert clip.fps == pytest.approx(24_000 / 1001) and shown(clip) == list(range(num_frames)) and read_num_frames(path) == num_frames


def test_three_frames_at_uneven_times(tmp_path):
    path = write(tmp_path / "a.mp4", counting(3), "yuv420p", times=[0, 1000, 3000], time_base=Fraction(1, 30_000), options={"bf": "0"})
    with pytest.warns(UserWarning, match="its frame rate varies"):
        assert len(read_clip(path).frames) >= 3


def test_tags_that_are_no_text_do_not_matter(tmp_path):
    path = write(tmp_path / "a.mkv", counting(3), "yuv420p")
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\x80avf"))
    assert shown(read_clip(path)) == [0, 1, 2]


@pytest.mark.parametrize("rate", [24, 25, 30, 60])
def test_rounded_times_are_no_varying_rate(tmp_path, rate):
    """Matroska rounds to milliseconds: 41, 42, 42, ..."""
    path = write(tmp_path / "a.mkv", counting(9), "yuv420p", rate=rate)
    assert read_timing(path).constant is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(read_clip(path)) == list(range(9))


def with_cover(tmp_path) -> Path:
    """A film whose first stream is a cover picture."""
    film = write(tmp_path / "film.mp4", counting(5), "yuv420p")
    cover = tmp_path / "cover.mp4"
    with av.open(str(film)) as given, av.open(str(cover), "w") as output:
        picture = output.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        copied = output.add_stream_from_template(given.streams.video[0])
        frame = av.VideoFrame.from_ndarray(flat_yuv(200, 128, 128, 32, 32), format="yuvj420p")
        for packet in [*picture.encode(frame), *picture.encode()]:
            output.mux(packet)
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                packet.stream = copied
                output.mux(packet)
    cover.write_bytes(tags_first(cover.read_bytes()))
    return cover


def tags_first(data: bytes) -> bytes:
    """An MP4 whose moov, the last box, holds its tags before its tracks, as some editors write it."""
    boxes = [(int.from_bytes(data[at : at + 4]), at) for at in box_starts(data, 0, len(data))]
    size, at = next((size, at) for size, at in boxes if data[at + 4 : at + 8] == b"moov")
    assert at + size == len(data)
    inner = [data[start : start + int.from_bytes(data[start : start + 4])] for start in box_starts(data, at + 8, at + size)]
    return data[: at + 8] + b"".join(sorted(inner, key=lambda box: ("mvhd", "udta", "trak").index(box[4:8].decode())))


def box_starts(data: bytes, at: int, end: int) -> list[int]:
    starts = []
    while at < end:
        starts.append(at)
        at += int.from_bytes(data[at : at + 4])
    return starts


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = with_cover(tmp_path)
    with av.open(str(path)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    assert shown(read_clip(path)) == list(range(5)) and read_fps(path) == 24
    add_sound(path, path, path)  # has none, and its first video stream has no times


def test_interlaced_video_has_no_combs(tmp_path):
    """A bar that moves by 8 pixels between the fields; woven, its edges are combs of 8."""
    planes = []
    for index in range(5):
        luma = np.full((64, 96), 40, dtype=np.uint8)
        for field in (0, 1):
            left = 8 + 16 * index % 64 + 8 * field
            luma[field::2, left : left + 16] = 200
        planes.append(np.concatenate([luma.reshape(-1), np.full(64 * 96 // 2, 128, dtype=np.uint8)]).reshape(96, 96))
    path = write(tmp_path / "tv.mkv", planes, "yuv420p", options={"x264-params": "tff=1"})
    with pytest.warns(UserWarning, match=r"interlaced, .* \(bwdif\)"):
        frames = read_clip(path).frames
    assert len(frames) == 5
    combs = (frames[2, 1:-1] - (frames[2, :-2] + frames[2, 2:]) / 2).abs()[8:-8]
    assert combs.mean() < 0.01  # woven: 0.1
