"""MiVE Keep Source Detail: edits of any editor come back at the source's size."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mive_core.delivery import ANCHORS, deliver
from mive_core.media.fit import resize, resize_and_crop
from mive_core.media.video import read_clip
from mive_core.pipeline import EMBEDDED
from mive_core.vae import VAE

NODE = "MiVEKeepSourceDetail"
SAMPLE = Path(__file__).resolve().parents[2] / "mive_core" / "assets" / "samples" / "bigbuckbunny_33f.mp4"
SIZE = (112, 64)  # of the edit: nearly the sample's shape, 192x112


@pytest.fixture(scope="module")
def vae(pack):
    import nodes

    return nodes.VAELoader().load_vae("tiny/vae.safetensors")[0]


@pytest.fixture(scope="module")
def library_vae() -> VAE:
    return VAE.load(EMBEDDED["tiny"] / "vae.safetensors")


@pytest.fixture(scope="module")
def source() -> Tensor:
    return read_clip(SAMPLE, num_frames=5).frames


def clip(num_frames: int = 5, height: int = 64, width: int = 112) -> Tensor:
    return torch.rand(num_frames, height, width, 3, generator=torch.Generator().manual_seed(1))


def resized(frames: Tensor, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.stack([resize(frame, size) for frame in frames])


def warm(frames: Tensor) -> Tensor:
    """A stock editor stand-in: another look in the same framing."""
    return frames * torch.tensor([1.0, 0.7, 0.5])


def left_half(num_masks: int = 1, height: int = 112, width: int = 192) -> Tensor:
    mask = torch.zeros(num_masks, height, width)
    mask[:, :, : width // 2] = 1
    return mask


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max((a - b).square().mean().item(), 1e-12))


def refused(pack, **inputs) -> str:
    with pytest.raises(ValueError) as caught:
        pack.run(NODE, **inputs)
    assert type(caught.value).__name__ == "UserError", repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "num_frames, source_size, edit_size",
    [(5, (187, 113), (112, 64)), (1, (192, 112), (112, 64)), (2, (101, 57), (100, 60)), (4, (64, 36), (112, 64))],
    ids=["odd sides", "one frame", "an edit that the VAE would crop, 2 frames", "an edit larger than the source, 4 frames"],
)
def test_has_the_sources_size(pack, vae, source, num_frames, source_size, edit_size):
    frames = resized(source[:num_frames], source_size)
    (video,) = pack.run(NODE, source=frames, edited=warm(resized(frames, edit_size)), vae=vae)
    assert video.shape == frames.shape and video.dtype == torch.float32 and video.device.type == "cpu"
    assert 0 <= video.min() and video.max() <= 1 and psnr(video, warm(frames)) > 25


def test_offers_the_librarys_anchors(pack):
    assert [tuple(item.options) for item in pack.node(NODE).define_schema().inputs if item.id == "anchor"] == [ANCHORS]


@pytest.mark.parametrize("anchor", ANCHORS)
def test_equals_the_library(pack, vae, library_vae, source, anchor):
    small = resized(source)
    edited, reference, mask = warm(small), warm(source[:1]), left_half(5)
    round_trip = library_vae.decode(library_vae.encode(small))
    expected = torch.stack(list(deliver(source, edited, round_trip, reference[0], mask, anchor=anchor)))
    (video,) = pack.run(NODE, source=source, edited=edited, vae=vae, reference=reference, mask=mask, anchor=anchor)
    torch.testing.assert_close(video, expected, atol=1e-4, rtol=0)


def test_the_round_trip_of_four_frames_is_that_of_five(pack, vae, library_vae, source):
    small = resized(source[[0, 1, 2, 3, 3]])
    round_trip = pack.submodule("nodes.bridge.vae").round_trip
    with torch.inference_mode():
        found = round_trip(vae, small[:4])
    torch.testing.assert_close(found, library_vae.decode(library_vae.encode(small))[:4], atol=1e-5, rtol=0)


def test_outside_of_the_mask_is_the_source(pack, vae, source):
    edited = warm(resized(source))
    for mask in (left_half(), left_half(5, 56, 96)):
        (video,) = pack.run(NODE, source=source, edited=edited, vae=vae, mask=mask)
        assert torch.equal(video[:, :, 100:], source[:, :, 100:])
        assert psnr(video[:, :, :80], warm(source)[:, :, :80]) > 30


def test_a_stock_editors_look_becomes_sharp(pack, vae, library_vae, source):
    """The editor's own VAE blurred its result. Against it stands the enlarged edit, which a workflow has without the node."""
    small, truth = resized(source), warm(source)
    edited = library_vae.decode(library_vae.encode(warm(small)))
    (video,) = pack.run(NODE, source=source, edited=edited, vae=vae)
    (anchored,) = pack.run(NODE, source=source, edited=edited, vae=vae, reference=truth[:1])
    enlarged = psnr(resized(edited, (192, 112)), truth)
    assert psnr(video, truth) > enlarged + 6 and psnr(anchored, truth) > enlarged + 15


def test_an_edit_that_changes_nothing_gives_the_source(pack, vae, library_vae, source):
    """At the source's size, or as an editor returns it: small and through its VAE. The reference then is the source's first frame."""
    for edited in (source, library_vae.decode(library_vae.encode(resized(source)))):
        for given in ({}, {"reference": source[:1]}):
            (video,) = pack.run(NODE, source=source, edited=edited, vae=vae, **given)
            assert psnr(video, source) >= 40


def test_a_longer_source_is_cut(pack, vae, source, caplog):
    """And with it a mask that has as many frames."""
    longer, mask = source[[0, 1, 2, 3, 4, 4, 4]], left_half(7)
    mask[5:] = 1
    edited = warm(resized(source))
    (video,) = pack.run(NODE, source=longer, edited=edited, vae=vae, mask=mask)
    assert "source: 7 frames are cut to the edit's 5" in caplog.text
    assert torch.equal(video, pack.run(NODE, source=source, edited=edited, vae=vae, mask=left_half())[0])


@pytest.mark.parametrize("num_frames", [2, 3, 4])
def test_frames_that_padded_the_source_are_cut_off(pack, vae, source, num_frames):
    """Preflight repeats the last frame up to 4n+1; the masks may be as many as the source's frames or the edit's."""
    padded = pack.run("MiVEPreflight", video=source[:num_frames], policy="pad", width=112, height=64)[0]
    assert len(padded) == 5
    mask = left_half(5)
    expected = pack.run(NODE, source=source[:num_frames], edited=warm(padded)[:num_frames], vae=vae, mask=mask[:num_frames])[0]
    for masks in (mask, mask[:num_frames]):
        (video,) = pack.run(NODE, source=source[:num_frames], edited=warm(padded), vae=vae, mask=masks)
        assert video.shape == (num_frames, 112, 192, 3) and torch.equal(video, expected)


def test_another_shape_is_noted(pack, vae, source, caplog):
    pack.run(NODE, source=source[:, :100], edited=warm(resized(source)), vae=vae)
    assert "112x64 is taken for the whole picture of 192x100, stretched by 9.7%" in caplog.text
    caplog.clear()
    pack.run(NODE, source=resized(source, (224, 128)), edited=warm(resized(source)), vae=vae)
    assert not caplog.records


def test_a_slight_crop_is_noted_where_it_is_seen(pack, vae, source, caplog):
    """MiVE's own nodes scale the whole picture to nearly its shape, others crop it."""
    pack.run(NODE, source=source, edited=warm(resized(source, (112, 68))), vae=vae)
    assert not caplog.records
    pack.run(NODE, source=source, edited=warm(resize_and_crop(source, (112, 68))), vae=vae)
    assert "stretched by 4.1%; if it was cropped" in caplog.text


def broken(frames: Tensor, index: int) -> Tensor:
    frames = frames.clone()
    frames[index, 0, 0, 0] = float("nan")
    return frames


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"source": clip(1, 112, 192)}, "the source is shorter than its edit; got 1 frames; expected 5"),
        ({"source": clip(3, 112, 192), "edited": clip(4)}, "the source is shorter than its edit; got 3 frames; expected 4"),
        ({"source": clip(5, 112, 112)}, "edited: the edit has another shape than the source; got 112x64 for a source of 112x112"),
        ({"source": clip(5, 64, 192)}, "the editor must keep the source's framing"),
        ({"source": clip(5, 112, 192)[:0]}, "source: the clip holds 0 frames"),
        ({"edited": clip()[:0]}, "edited: the clip holds 0 frames"),
        ({"source": broken(clip(5, 112, 192), 3)}, "source: NaN or infinite pixels; got frame 3"),
        ({"edited": broken(clip(), 2)}, "edited: NaN or infinite pixels; got frame 2"),
        ({"reference": broken(clip(1), 0)}, "reference: NaN or infinite pixels; got frame 0"),
        ({"reference": clip(2)}, "reference: one reference is needed; got 2 images"),
        ({"mask": torch.ones(3, 8, 8)}, "mask: the mask does not fit the clip; got shape (3, 8, 8); expected 1 or 5 masks"),
        ({"mask": torch.full((1, 8, 8), float("nan"))}, "mask: NaN or infinite values"),
        ({"anchor": "on"}, "anchor: an anchor needs a reference"),
        ({"anchor": "maybe"}, "anchor: unknown anchor; got 'maybe'"),
    ],
)
def test_bad_input_is_refused(pack, vae, changed, message):
    assert message in refused(pack, **{**dict(source=clip(5, 112, 192), edited=clip(), vae=vae), **changed})


@pytest.mark.parametrize("changed", [{"mask": torch.ones(3, 8, 8)}, {"anchor": "on"}, {"anchor": "maybe"}, {"mask": torch.full((1, 8, 8), float("nan"))}])
def test_options_are_refused_before_the_round_trip(pack, changed):
    refused(pack, source=clip(5, 112, 192), edited=clip(), vae=None, **changed)  # without a VAE, whatever came first would fail otherwise


def test_an_empty_mask_is_noted(pack, vae, source, caplog):
    (video,) = pack.run(NODE, source=source, edited=warm(resized(source)), vae=vae, mask=torch.zeros(1, 64, 64))
    assert torch.equal(video, source) and "the mask is empty: the source comes back unchanged" in caplog.text


def test_a_vae_of_images_works(pack, source):
    """It has no latent frames; the round trip goes frame by frame."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(4)
    weights = {key: torch.randn(value.shape) * 0.05 for key, value in TAESD().state_dict().items()}
    images = comfy.sd.VAE(sd={**weights, "vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)})
    (video,) = pack.run(NODE, source=source[:3], edited=warm(resized(source[:3])), vae=images)
    assert video.shape == (3, 112, 192, 3)


def test_shows_its_progress_and_stops_at_cancel(pack, vae, source, monkeypatch):
    import comfy.model_management
    import comfy.utils

    shown = []

    def update(self, value, total=None, preview=None):
        shown.append(value)
        comfy.model_management.interrupt_current_processing(value == 3)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        pack.run(NODE, source=source, edited=warm(resized(source)), vae=vae)
    assert shown == [1, 2, 3]


def test_keyframes_anchor_too(pack, vae, library_vae, source):
    """A patch enters at frame 3; the edit leaves it as it is, a keyframe shows it in blue."""
    before, truth = source.clone(), source.clone()
    before[3:, 30:80, 60:130] = torch.tensor([0.9, 0.1, 0.1])
    truth[3:, 30:80, 60:130] = torch.tensor([0.1, 0.2, 0.9])
    edited = resized(0.5 * (before + truth))
    given = dict(source=before, edited=edited, vae=vae, reference=before[:1])
    (plain,) = pack.run(NODE, **given)
    (keyed,) = pack.run(NODE, **given, keyframes={"keyframe_0": truth[4:5]}, keyframe_numbers="4")
    assert psnr(keyed[3:, 35:75, 65:125], truth[3:, 35:75, 65:125]) > psnr(plain[3:, 35:75, 65:125], truth[3:, 35:75, 65:125]) + 6


def test_a_shifted_reference_is_registered(pack, source):
    """By 6 pixels, in the size of a larger picture."""
    moved = torch.roll(warm(source[:1]), (0, 6), dims=(1, 2))
    larger = torch.nn.functional.interpolate(moved.movedim(-1, 1), scale_factor=2, mode="bicubic").movedim(1, -1).clamp(0, 1)
    (registered,) = pack.run("MiVERegisterReference", source=source, reference=larger)
    assert registered.shape == (1, 112, 192, 3)
    inner = (0, slice(8, -8), slice(16, -16))
    assert psnr(registered[inner], warm(source[:1])[inner]) > psnr(moved[inner], warm(source[:1])[inner]) + 6
    (same,) = pack.run("MiVERegisterReference", source=source, reference=warm(source[:1]))
    assert torch.equal(same, warm(source[:1]))
