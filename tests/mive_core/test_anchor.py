"""The anchor: colours that frame 0's reference shows, carried to later frames where they can be trusted."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import mive_core
from mive_core.anchor import apply_anchor, fit_anchor, fit_lut, lacks_edit, lookup, restore, shows_edit
from mive_core.detail import fit_color_maps
from mive_core.media.video import read_clip

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"


@pytest.fixture(scope="module")
def frames():
    return read_clip(SAMPLE, num_frames=9).frames


def small(frame: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(frame.movedim(-1, 0)[None], 2)[0].movedim(0, -1)


def curve(x: torch.Tensor) -> torch.Tensor:
    """A look that no affine map gives."""
    return 0.5 - 0.5 * torch.cos(1.5 * torch.pi * x)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b).square().mean().log10()).item()


def anchored(frames: torch.Tensor, truth: torch.Tensor, edit: torch.Tensor, index: int) -> torch.Tensor:
    anchor = fit_anchor(frames[0], edit[0], truth[0], small(frames[0]), small(edit[0]))
    return apply_anchor(anchor, frames[index], edit[index], small(frames[index]), small(edit[index]))


def test_a_look_of_another_strength_is_corrected_in_every_frame(frames):
    """The model gives half of what the reference shows."""
    truth = curve(frames)
    edit = frames + 0.5 * (truth - frames)
    assert psnr(edit[8], truth[8]) < 22 and psnr(anchored(frames, truth, edit, 8), truth[8]) > 40


def test_a_colour_that_is_treated_in_two_ways_is_left_to_the_edit(frames):
    """The left half is inverted, the right one is not: no table of colours tells which, and the edit is right."""
    truth = frames.clone()
    truth[:, :, :96] = 1 - truth[:, :, :96]
    edit = (truth + 0.01).clamp(0, 1)
    assert psnr(anchored(frames, truth, edit, 8), truth[8]) > psnr(edit[8], truth[8]) - 0.3


def test_a_colour_that_frame_0_does_not_hold_is_left_to_the_edit(frames):
    """A magenta square enters later; the model keeps it, and the table of a look has never seen it."""
    truth = curve(frames)
    frames, truth = frames.clone(), truth.clone()
    frames[8, 40:80, 40:80] = truth[8, 40:80, 40:80] = torch.tensor([0.95, 0.02, 0.9])
    edit = truth * 0.98
    out = anchored(frames, truth, edit, 8)
    assert psnr(out[42:78, 42:78], truth[8, 42:78, 42:78]) > 28


def test_where_the_edit_disagrees_more_than_in_frame_0_it_is_believed(frames):
    """Green turns red in frame 0; in a later frame the model leaves it green, as for another object of that colour."""
    truth = frames[..., [1, 0, 2]]
    later = frames[8]
    anchor = fit_anchor(frames[0], truth[0], truth[0], small(frames[0]), small(truth[0]))
    kept = apply_anchor(anchor, later, later, small(later), small(later))
    agreed = apply_anchor(anchor, later, truth[8], small(later), small(truth[8]))
    assert psnr(kept, later) > 26 and psnr(agreed, truth[8]) > 38


def test_a_reference_without_an_edit_is_known(frames):
    noise = 0.02 * torch.randn(frames[0].shape, generator=torch.Generator().manual_seed(0))
    assert not shows_edit(frames[0], frames[0]) and not shows_edit((frames[0] + noise).clamp(0, 1), frames[0])
    patch = frames[0].clone()
    patch[20:50, 60:90] = torch.tensor([0.9, 0.1, 0.1])
    assert shows_edit(patch, frames[0]) and shows_edit(curve(frames[0]), frames[0])


def test_a_lut_is_trilinear_and_smooth():
    colours = torch.rand(4000, 3, generator=torch.Generator().manual_seed(2))
    lut = fit_lut(colours, colours @ torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]]) - colours)
    test = torch.rand(7, 5, 3)
    assert torch.allclose(test + lookup(lut, test), test[..., [2, 0, 1]], atol=2e-2)
    one_colour = fit_lut(torch.full((100, 3), 0.4), torch.full((100, 3), 0.2))
    assert torch.isfinite(one_colour).all() and torch.allclose(lookup(one_colour, torch.full((1, 3), 0.4)), torch.full((1, 3), 0.2), atol=0.02)


CASTS = {"warm": ((1.1, 1.0, 0.9), 0.0), "faded": ((0.9, 0.9, 0.9), 0.05), "tinted": ((1.06, 0.97, 0.92), 0.02)}


def cast(frame: torch.Tensor, name: str) -> torch.Tensor:
    gain, offset = CASTS[name]
    return (frame * torch.tensor(gain) + offset).clamp(0, 1)


def local_edit(frame: torch.Tensor) -> torch.Tensor:
    edited = frame.clone()
    edited[30:90, 40:110] = 1 - edited[30:90, 40:110]
    return edited


def restored(reference: torch.Tensor, frame: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    """`edited`: what the model made of the frame."""
    maps = fit_color_maps(small(edited)[None], small(frame)[None])[0]
    return restore(reference, frame, edited, maps, small(frame))[0]


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_beside_an_edit_is_removed(frames, name):
    truth = local_edit(frames[0])
    reference = cast(truth, name)
    assert psnr(restored(reference, frames[0], truth), truth) > max(40, psnr(reference, truth) + 8)


@pytest.mark.parametrize("name", CASTS)
def test_a_weak_look_is_no_cast(frames, name):
    """The model does a part of the look, or nothing: no edit stands beside it, so the change of the whole picture is the edit."""
    reference = cast(frames[0], name)
    for share in (0.0, 0.3, 1.0):
        assert restored(reference, frames[0], frames[0] + share * (reference - frames[0])) is reference


def test_a_clean_reference_stays_as_it_is(frames):
    truth = local_edit(frames[0])
    assert psnr(restored(truth, frames[0], truth), truth) > 60


def test_noise_of_the_reference_is_measured(frames):
    truth = local_edit(frames[0])
    noisy = (truth + 0.02 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    maps = fit_color_maps(small(truth)[None], small(frames[0])[None])[0]
    clean, noise = restore(noisy, frames[0], truth, maps, small(frames[0]))
    assert 2e-4 < noise < 5e-4 and psnr(clean, truth) > psnr(noisy, truth) + 3


@pytest.mark.parametrize("name", CASTS)
def test_a_tinted_first_frame_lacks_the_edit_that_words_asked_for(frames, name):
    edited, first = small(local_edit(frames[0])), small(frames[0])
    assert lacks_edit(cast(frames[0], name), frames[0], first, edited)
    assert not lacks_edit(cast(local_edit(frames[0]), name), frames[0], first, edited)
    assert not lacks_edit(curve(frames[0]), frames[0], first, small(frames[0] + 0.5 * (curve(frames[0]) - frames[0])))
