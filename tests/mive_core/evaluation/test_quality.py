"""Figures that need no weights: by hand, by scikit-image's whole-picture figures, and by clips that are wrong in one way each."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity

from mive_core.evaluation.quality import QUALITY, ciede2000, evenly_spaced, flicker, quality, ssim_map, warping_errors
from mive_core.types import Clip, EditRequest, PairedEdit

SIDE, COUNT, STEP = 96, 5, 2


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """A photograph, (300, 451, 3)."""
    return torch.from_numpy(data.chelsea().astype(np.float32) / 255)


@pytest.fixture(scope="module")
def pair(photo) -> PairedEdit:
    """A camera that moves STEP pixels a frame; in the target the left half is darker, and the mask says so."""
    source = torch.stack([photo[60 : 60 + SIDE, 100 + STEP * i : 100 + STEP * i + SIDE] for i in range(COUNT)])
    mask = torch.zeros(source.shape[:3], dtype=torch.bool)
    mask[:, :, : SIDE // 2] = True
    target = torch.where(mask[..., None], source * 0.5, source)
    return PairedEdit(EditRequest(Clip(source, 8.0), target[0], "darken the left half"), target, mask)


def test_ssim_is_scikit_images(photo):
    first, second = photo[:96, :96], (photo[:96, :96] + 0.1 * torch.randn(96, 96, 3, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    options = dict(channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    inner = ssim_map(first[None], second[None])[0, 5:-5, 5:-5].mean().item()
    assert inner == pytest.approx(structural_similarity(first.numpy(), second.numpy(), **options), abs=1e-6)
    assert inner < 0.9


def test_ciede2000_of_published_colours():
    """Sharma, Wu and Dalal (2005) give differences in Lab; here two grays, whose difference follows from lightness alone."""
    lightness = lambda value: 116 * (((value + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16
    first, second = torch.full((4, 4, 3), 0.5), torch.full((4, 4, 3), 0.6)
    middle = (lightness(0.5) + lightness(0.6)) / 2 - 50
    expected = (lightness(0.6) - lightness(0.5)) / (1 + 0.015 * middle**2 / math.sqrt(20 + middle**2))
    everywhere = torch.ones(4, 4, dtype=torch.bool)
    assert ciede2000(first, second, everywhere) == pytest.approx(expected, abs=1e-3)
    assert ciede2000(first, second, ~everywhere) is None and ciede2000(first, first, everywhere) == 0


def test_a_perfect_edit(pair):
    figures = quality(pair, pair.target)
    assert tuple(figures) == QUALITY
    assert figures["ssim"] == figures["ssim_edited"] == figures["reference_ssim"] == pytest.approx(1)
    assert figures["kept_ciede2000"] == figures["reference_ciede2000"] == 0 and figures["kept_psnr"] == 100 and figures["kept_ssim"] > 0.95
    assert figures["warping_error_source"] == pytest.approx(quality(pair, pair.request.source.frames)["warping_error"])


def test_each_fault_shows_in_its_own_figure(pair):
    right = quality(pair, pair.target)
    cast = quality(pair, torch.where(pair.mask[..., None], pair.target, pair.target + torch.tensor([0.1, 0.0, 0.0])))
    assert cast["kept_ciede2000"] > 3 and cast["kept_psnr"] < 30 and cast["ssim_edited"] == pytest.approx(right["ssim_edited"], abs=0.02)
    late = pair.target.clone()
    late[0] = pair.request.source.frames[0]
    assert quality(pair, late)["reference_ciede2000"] > 5 and quality(pair, late)["reference_ssim"] < 0.9
    noise = 0.1 * torch.randn(COUNT, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(0))
    assert quality(pair, (pair.target + noise).clamp(0, 1))["warping_error"] > 10 * right["warping_error"]
    assert quality(pair, (pair.target + noise[:1]).clamp(0, 1))["warping_error"] > 10 * right["warping_error"]  # noise that sticks to the glass


def test_warping_error_follows_the_motion(pair):
    """Compared without the flow, a moving camera's frames would differ by far more."""
    source = pair.request.source.frames
    errors = warping_errors(source * 0.5, source)
    still = source.diff(dim=0).square().mean().item()
    assert errors["warping_error_source"] < still / 5 and errors["warping_error"] < errors["warping_error_source"]
    assert warping_errors(source[:1], source[:1]) == {"warping_error": None, "warping_error_source": None}


def test_flicker_is_measured_where_the_source_stands_still(photo):
    source = photo[:32, :32].expand(4, 32, 32, 3).clone()
    blinking = source.clone()
    blinking[1::2] += 3 / 255
    assert flicker(blinking, source) == pytest.approx(3, abs=1e-3) and flicker(source, source) == 0
    moving = source.clone()
    moving[1::2, :, :16] = 1 - moving[1::2, :, :16]
    assert flicker(moving, moving) == pytest.approx(0, abs=1e-4)  # the moving half does not count
    assert flicker(blinking, torch.rand(4, 32, 32, 3, generator=torch.Generator().manual_seed(0))) is None
    assert flicker(source[:1], source[:1]) is None


def test_what_cannot_be_measured_is_none(pair):
    source = pair.request.source.frames
    bare = PairedEdit(EditRequest(pair.request.source, source[0], "x"), None, None)
    known = {name for name, value in quality(bare, source).items() if value is not None}
    assert known <= {"flicker", "warping_error", "warping_error_source"} and "warping_error" in known
    masked = quality(replace(pair, target=None), source)
    assert masked["ssim"] is None and masked["kept_psnr"] == 100 and masked["reference_psnr"] is not None
    assert quality(replace(pair, mask=torch.ones_like(pair.mask)), source)["kept_ciede2000"] is None
    assert set(quality(pair, torch.full_like(source, math.nan)).values()) == {None}


def test_frames_are_evenly_spaced():
    assert evenly_spaced(5, 16) == [0, 1, 2, 3, 4] and evenly_spaced(81, 3) == [0, 40, 80] and evenly_spaced(0, 8) == []
