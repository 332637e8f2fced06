"""Local colour maps: the edit's colours with the source's sharpness."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import mive_core
from mive_core import detail
from mive_core.detail import HALO, apply_color_map, fit_affine, fit_color_maps, invert, multiply, transform, window_mean
from mive_core.media.video import read_clip

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"


@pytest.fixture(scope="module")
def source():
    """Real footage, (5, 112, 192, 3)."""
    return read_clip(SAMPLE, num_frames=5).frames


def blurred(frames: torch.Tensor) -> torch.Tensor:
    """At half the size and soft, as a VAE renders it: (F, H, W, 3) -> (F, H / 2, W / 2, 3)."""
    return F.avg_pool2d(F.avg_pool2d(frames.movedim(-1, 1), 2), 3, 1, 1, count_include_pad=False).movedim(1, -1)


def look(frames: torch.Tensor) -> torch.Tensor:
    return frames * torch.tensor([0.3, 0.4, 0.8]) + torch.tensor([0.02, 0.0, 0.1])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b).square().mean().log10()).item()


def delivered(source: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    maps = fit_color_maps(edited, blurred(source))
    return torch.stack([apply_color_map(*frame) for frame in zip(maps, source, edited)])


def test_a_look_comes_back_sharp_at_the_sources_size(source):
    edited = blurred(look(source))
    enlarged = F.interpolate(edited.movedim(-1, 1), source.shape[1:3], mode="bilinear").movedim(1, -1)
    assert psnr(delivered(source, edited), look(source)) > psnr(enlarged, look(source)) + 9


def test_what_no_map_explains_stays_the_edits(source):
    """A flat patch over textured footage is no colour map of it."""
    edited, patch = blurred(source), torch.zeros(56, 96, dtype=torch.bool)
    patch[14:42, 24:72] = True
    stripes = (torch.arange(96) // 6 % 2).float()[None, :, None] * torch.tensor([0.9, 0.1, 0.6])
    edited = torch.where(patch[..., None], stripes, edited)
    out = delivered(source, edited)
    inner = (slice(None), slice(40, 72), slice(64, 128))
    expected = F.interpolate(edited.movedim(-1, 1), source.shape[1:3], mode="bilinear").movedim(1, -1)
    assert psnr(out[inner], expected[inner]) > 30
    assert psnr(out[:, :, :20], source[:, :, :20]) > 40  # and away from it the source


def test_the_models_own_noise_is_no_edit(source):
    """An edit that changes nothing but by the errors of a model, here of 3 %, gives the source back."""
    noise = F.interpolate(torch.randn(5, 3, 7, 12, generator=torch.Generator().manual_seed(0)), (56, 96), mode="bilinear").movedim(1, -1)
    assert psnr(delivered(source, (blurred(source) + 0.03 * noise).clamp(0, 1)), source) > 36
    assert psnr(delivered(source, blurred(source)), source) > 50


def test_chunks_with_a_halo_equal_the_whole(source):
    clip = torch.cat([source, source.flip(0)])
    edited, whole = blurred(look(clip)), fit_color_maps(blurred(look(clip)), blurred(clip))
    part = fit_color_maps(edited[3 - HALO : 6 + HALO], blurred(clip)[3 - HALO : 6 + HALO])[HALO:-HALO]
    assert torch.allclose(part, whole[3:6], atol=1e-5)


def test_maps_of_a_large_edit_are_fitted_at_a_reduced_size(source, monkeypatch):
    """Nearly the same picture, and what is new in it stays as sharp."""
    large = F.interpolate(source[:2].movedim(-1, 1), (224, 384), mode="bicubic").movedim(1, -1).clamp(0, 1)
    target = look(large)
    target[:, 60:160, 100:260] = torch.tensor([0.9, 0.1, 0.6])
    edited, round_trip = (F.avg_pool2d(x.movedim(-1, 1), 5, 1, 2, count_include_pad=False).movedim(1, -1) for x in (target, large))
    out = []
    for side in (80, 224):
        monkeypatch.setattr(detail, "FIT_SIDE", side)
        maps = fit_color_maps(edited, round_trip)
        assert maps.shape == (2, 13, 224, 384)
        out.append(torch.stack([apply_color_map(*frame) for frame in zip(maps, large, edited)]))
    patch = (slice(None), slice(60, 160), slice(100, 260))
    for region in (slice(None), patch):
        assert psnr(out[0][region], target[region]) > psnr(out[1][region], target[region]) - 0.5


def test_one_frame_and_odd_sizes(source):
    frame = F.interpolate(source[:1].movedim(-1, 1), (113, 191), mode="bilinear").movedim(1, -1)
    edited = blurred(look(source))[:1]
    maps = fit_color_maps(edited, blurred(source)[:1])
    out = apply_color_map(maps[0], frame[0], edited[0])
    assert out.shape == (113, 191, 3) and psnr(out, look(frame)[0]) > 30


def test_the_algebra_of_three_by_three():
    m = torch.eye(3).flatten()[None, :, None, None] + 0.3 * torch.randn(2, 9, 4, 5, generator=torch.Generator().manual_seed(1))
    square = lambda x: x.movedim(1, -1).unflatten(-1, (3, 3))
    assert torch.allclose(square(invert(m)), torch.linalg.inv(square(m)), atol=1e-4)
    assert torch.allclose(square(multiply(m, m)), square(m) @ square(m), atol=1e-5)
    x = torch.randn(2, 3, 4, 5)
    assert torch.allclose(transform(m, x).movedim(1, -1), (square(m) @ x.movedim(1, -1)[..., None])[..., 0], atol=1e-5)


def test_a_window_counts_what_lies_inside():
    x = torch.arange(12.0).view(3, 1, 2, 2)
    assert torch.allclose(window_mean(x, 2)[:, 0, 0, 0], torch.tensor([(1.5 + 5.5) / 2, 5.5, 7.5]))


def test_float64_gives_the_same(source):
    """What differs between devices is rounding: it may not grow in the fit."""
    edited, round_trip = blurred(look(source)), blurred(source)
    single, double = fit_color_maps(edited, round_trip), fit_color_maps(edited.double(), round_trip.double())
    out = [apply_color_map(maps[2].float(), source[2], edited[2]) for maps in (single, double)]
    assert (out[0] - out[1]).abs().max() < 1e-4
    assert torch.isfinite(fit_affine(*(torch.full((1, 3, 32, 32), value) for value in (0.2, 0.9)))[0]).all()
