"""From file to file: the source's size and length come back, whatever size the edit was made at."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from torch.nn import functional as F

import mive_core
from mive_core.config import TEMPORAL_FACTOR
from mive_core.data.edit_file import FileOptions, edit_file, prepare
from mive_core.data.manifest import ManifestEntry
from mive_core.delivery import LARGEST_WINDOW, deliver
from mive_core.detail import HALO
from mive_core.errors import UserError
from mive_core.evaluation.evaluate import EvaluationSettings
from mive_core.media.encode import Encoding
from mive_core.media.images import write_image
from mive_core.media.video import read_clip, write_stream, write_video
from mive_core.pipeline import Pipeline
from mive_core.types import Clip
from mive_core.vae import VAE

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"


@pytest.fixture(scope="module")
def pipeline(random_models):
    return Pipeline.load(random_models)


@pytest.fixture
def entry(tmp_path):
    """Seven frames of 150x86, and a reference of another size."""
    frames = torch.rand(7, 9, 16, 3, generator=torch.Generator().manual_seed(0)).movedim(-1, 1)
    frames = F.interpolate(frames, (86, 150), mode="bicubic").movedim(1, -1).clamp(0, 1)
    write_video(tmp_path / "clip.mp4", Clip(frames, 12.0))
    write_image(tmp_path / "first.png", (frames[0] * 0.5).contiguous())
    return ManifestEntry(tmp_path / "clip.mp4", tmp_path / "first.png", "make it dark")


def test_the_sources_size_length_and_rate_come_back(pipeline, entry, tmp_path):
    prepared = prepare(entry, replace(pipeline.config, edit_pixels=64 * 48))
    assert prepared.size == (150, 86) and prepared.num_frames == 7 and prepared.request.source.frames.shape == (9, 32, 64, 3)
    path, seconds = edit_file(pipeline, prepared, tmp_path / "out.mp4", EvaluationSettings(steps=1))
    out = read_clip(path)
    assert out.frames.shape == (7, 86, 150, 3) and out.fps == 12.0 and seconds > 0


def test_without_detail_it_is_the_models_own_picture(pipeline, entry, tmp_path):
    options = FileOptions(size=(64, 32), num_frames=5, detail="off")
    path, _ = edit_file(pipeline, prepare(entry, pipeline.config, options), tmp_path / "out.mp4", EvaluationSettings(steps=1), options)
    expected = pipeline.edit(prepare(entry, pipeline.config, options).request, steps=1).frames
    assert (read_clip(path).frames - expected).abs().mean() < 0.06  # a codec on noise


@pytest.mark.parametrize("detail", ["auto", "off"])
def test_the_sources_sound_comes_back(pipeline, entry, tmp_path, detail):
    with av.open(str(tmp_path / "loud.mp4"), "w") as loud, av.open(str(entry.source)) as silent:
        video, audio = loud.add_stream_from_template(silent.streams.video[0]), loud.add_stream("aac", rate=48000, layout="mono")
        for packet in silent.demux(video=0):
            if packet.size:
                packet.stream = video
                loud.mux(packet)
        frame = av.AudioFrame.from_ndarray(torch.rand(1, 48000).numpy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        loud.mux(audio.encode(frame))
        loud.mux(audio.encode())
    options = FileOptions(num_frames=5, detail=detail)
    prepared = prepare(replace(entry, source=tmp_path / "loud.mp4"), replace(pipeline.config, edit_pixels=64 * 48), options)
    path, _ = edit_file(pipeline, prepared, tmp_path / "out.mp4", EvaluationSettings(steps=1), options)
    with av.open(str(path)) as out:
        samples = sum(frame.samples for frame in out.decode(audio=0))
    assert samples / 48000 == pytest.approx(5 / 12, abs=0.05)


def test_an_odd_size_comes_back_odd(pipeline, entry, tmp_path):
    odd = torch.rand(5, 33, 47, 3)
    write_image(tmp_path / "odd.png", odd[0])
    with pytest.warns(UserWarning, match="47x33 is odd"):
        write_stream(tmp_path / "odd.mp4", iter(odd), (47, 33), 8.0)
    prepared = prepare(replace(entry, source=tmp_path / "odd.mp4", reference=tmp_path / "odd.png"), pipeline.config)
    with pytest.warns(UserWarning, match="47x33 is odd"):
        path, _ = edit_file(pipeline, prepared, tmp_path / "out.mp4", EvaluationSettings(steps=1))
    assert read_clip(path).frames.shape == (5, 33, 47, 3)


def test_outside_of_a_mask_the_source_comes_back(pipeline, entry, tmp_path):
    mask = torch.zeros(20, 40, 3)
    mask[:, :20] = 1
    write_image(tmp_path / "mask.png", mask)
    options = FileOptions(mask=tmp_path / "mask.png")
    path, _ = edit_file(pipeline, prepare(entry, pipeline.config, options), tmp_path / "out.mp4", EvaluationSettings(steps=1), options)
    source, out = read_clip(entry.source).frames, read_clip(path).frames
    assert (out[:, :, 90:] - source[:, :, 90:]).abs().mean() < 0.02 < (out[:, :, :60] - source[:, :, :60]).abs().mean()


def test_a_keyframe_is_read_in_both_sizes(pipeline, entry, tmp_path):
    write_image(tmp_path / "later.png", torch.rand(86, 150, 3))
    keyed = replace(entry, keyframes=((5, tmp_path / "later.png"),))
    prepared = prepare(keyed, replace(pipeline.config, edit_pixels=64 * 48))
    assert prepared.keyframes[0].image.shape == (86, 150, 3) and prepared.request.keyframes[0].image.shape == (32, 64, 3)
    path, _ = edit_file(pipeline, prepared, tmp_path / "out.mp4", EvaluationSettings(steps=1))
    assert read_clip(path).frames.shape == (7, 86, 150, 3)
    with pytest.raises(UserError, match="a keyframe lies outside of the clip; got frame 7; expected 1 to 6"):
        prepare(replace(entry, keyframes=((7, tmp_path / "later.png"),)), pipeline.config)
    with pytest.raises(UserError, match="was not taught keyframes"):
        prepare(keyed, replace(pipeline.config, keyframes=False))


def test_a_shifted_reference_is_registered_where_asked(pipeline, tmp_path, recwarn):
    """And told of where not."""
    clip = read_clip(SAMPLE, num_frames=5)
    write_video(tmp_path / "clip.mp4", clip)
    first = read_clip(tmp_path / "clip.mp4").frames[0] * torch.tensor([0.9, 0.6, 0.4])
    write_image(tmp_path / "moved.png", torch.roll(first, (4, 6), dims=(0, 1)))
    entry = ManifestEntry(tmp_path / "clip.mp4", tmp_path / "moved.png", "make it warm")
    registered = prepare(entry, pipeline.config, FileOptions(registered=True)).reference[12:-12, 16:-16]
    assert not recwarn
    given = prepare(entry, pipeline.config).reference[12:-12, 16:-16]
    assert [str(warning.message) for warning in recwarn] == [
        "reference: its framing differs from that of the source's first frame: moved right by 3%, moved down by 3%; "
        "register it (MiVE Register Reference, or --register)"
    ]
    error = [(reference - first[12:-12, 16:-16]).square().mean() for reference in (given, registered)]
    assert error[1] < 0.1 * error[0]


def test_what_cannot_be(pipeline, entry):
    with pytest.raises(UserError, match="the clip is shorter than asked; got 7 frames; expected 9; ask for 5 or fewer"):
        prepare(entry, pipeline.config, FileOptions(num_frames=9))
    with pytest.raises(UserError, match="4n\\+1"):
        prepare(entry, pipeline.config, FileOptions(num_frames=6))
    with pytest.raises(UserError, match="neither a reference nor a target"):
        prepare(replace(entry, reference=None), pipeline.config)
    with pytest.warns(UserWarning, match="is distorted to 64x64"):
        prepare(entry, pipeline.config, FileOptions(size=(64, 64)))


class CountingVAE(VAE):
    """Counts the decoded frames that are alive, and can fail after some."""

    alive = most = decodes = pieces = 0
    fails_after = 10**9

    def decode_pieces(self, latents):
        self.decodes += 1
        return map(self.count, super().decode_pieces(latents))

    def count(self, piece):
        self.pieces += 1
        if self.pieces > self.fails_after:
            raise KeyboardInterrupt
        self.alive += len(piece)
        self.most = max(self.most, self.alive)
        weakref.finalize(piece.untyped_storage(), self.die, len(piece))
        return piece

    def die(self, count):
        self.alive -= count


@pytest.fixture
def counted(pipeline):
    """Edits in stretches of 33 frames."""
    return replace(pipeline, vae=CountingVAE(pipeline.vae.network), config=replace(pipeline.config, edit_frames=33))


@pytest.fixture
def long_entry(tmp_path):
    """Eighty-two frames, which is no 4n+1, in three stretches; and a keyframe."""
    frames = torch.rand(1, 32, 48, 3) * torch.linspace(0.5, 1, 82).view(-1, 1, 1, 1)
    write_video(tmp_path / "long.mp4", Clip(frames, 12.0))
    write_image(tmp_path / "first.png", frames[0] * 0.5)
    return ManifestEntry(tmp_path / "long.mp4", tmp_path / "first.png", "make it dark", keyframes=((45, tmp_path / "first.png"),))


@pytest.mark.parametrize("detail", ["auto", "off"])
def test_few_decoded_frames_are_alive_at_once(counted, long_entry, tmp_path, detail):
    options, entry = FileOptions(size=(48, 32), detail=detail), replace(long_entry, keyframes=())
    path, _ = edit_file(counted, prepare(entry, counted.config, options), tmp_path / "out.mp4", EvaluationSettings(steps=1), options)
    assert len(read_clip(path).frames) == 82
    most = 2 * (LARGEST_WINDOW + 2 * TEMPORAL_FACTOR + 1 + HALO) if detail == "auto" else 2 * (3 * TEMPORAL_FACTOR)
    assert counted.vae.most <= most < 82 and not counted.vae.alive
    assert counted.vae.decodes == (6 if detail == "auto" else 5)  # the last stretch's round trip is of no use then


def test_an_anchor_with_a_late_keyframe_decodes_again_and_edits_once(counted, long_entry, tmp_path):
    options = FileOptions(size=(48, 32), anchor="on")
    prepared = prepare(long_entry, counted.config, options)
    path, _ = edit_file(counted, prepared, tmp_path / "out.mkv", EvaluationSettings(steps=1), replace(options, encoding=Encoding("ffv1")))
    assert counted.vae.decodes == 6 + 4 and counted.vae.most < 82  # the keyframe is in the second stretch
    result = counted.run(prepared.request, steps=1)
    edited, round_trip = (x[:82] for x in (result.edited.frames, result.round_trip))
    source = read_clip(long_entry.source).frames
    whole = deliver(iter(source), edited, round_trip, prepared.reference, anchor="on", keyframes=prepared.keyframes)
    assert (read_clip(path).frames - torch.stack(list(whole))).abs().max() < 0.5 / 255 + 1e-5


def test_an_interrupted_edit_leaves_the_old_file_and_no_half_one(counted, long_entry, tmp_path):
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "out.mp4"
    write_video(output, Clip(torch.rand(5, 32, 48, 3), 12.0))
    before, counted.vae.fails_after = output.read_bytes(), 25
    options = FileOptions(size=(48, 32))
    with pytest.raises(KeyboardInterrupt):
        edit_file(counted, prepare(replace(long_entry, keyframes=()), counted.config, options), output, EvaluationSettings(steps=1), options)
    assert list(output.parent.iterdir()) == [output] and output.read_bytes() == before


@pytest.mark.slow
def test_memory_does_not_grow_with_the_sources_size(peak_memory):
    """Forty frames of 1920x1080 are 1 GB as floats; delivering them takes a few frames' worth."""
    script = peak_memory + (
        "import torch; from mive_core.delivery import deliver\n"
        "small = torch.rand(40, 80, 144, 3); frames = (torch.full((1080, 1920, 3), i / 40) for i in range(40))\n"
        "next(deliver(iter([torch.rand(1080, 1920, 3)]), small[:1], small[:1], torch.rand(1080, 1920, 3)))\n"
        "before = peak()\n"
        "for _ in deliver(frames, small, small * 0.9, torch.rand(1080, 1920, 3)): pass\n"
        "print(peak(), peak() - before)"
    )
    total, growth = map(int, subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())
    assert total < 1.6e9 and growth < 4e8, (total, growth)
