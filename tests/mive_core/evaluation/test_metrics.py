import math

import pytest
import torch

from mive_core.evaluation.metrics import PSNR_CAP, edit_completion, first_frame_gap, psnr, psnr_by_frame, shows_edit, worst_frame


def db(error: float) -> float:
    return pytest.approx(-20 * math.log10(error), abs=1e-4)


def test_psnr_by_hand():
    frames, region = torch.full((2, 4, 4, 3), 0.5), torch.zeros(2, 4, 4, dtype=torch.bool)
    target = frames.clone()
    target[0] += 0.1
    assert psnr(frames, target, ~region) == pytest.approx(-10 * math.log10(0.01 / 2), abs=1e-4)  # over the clip, not the mean of frames
    region[0] = True
    assert psnr(frames, target, region) == db(0.1)
    assert psnr(frames, target, ~region) == PSNR_CAP
    assert psnr(frames, target, region & ~region) is None
    assert psnr(frames * math.nan, target, region) is None


def test_an_edit_is_done_where_every_frame_lies_nearer_to_the_target():
    source, target = torch.zeros(3, 10, 10, 3), torch.zeros(3, 10, 10, 3)
    target[:, :5] = 0.8
    half = source.clone()
    half[:, :5] = 0.5  # more than half of the way, 0.3 from the target
    short = half.clone()
    short[1, :5, :4] = 0.3  # in one frame 20 of 50 pixels stay behind
    assert edit_completion(half, source, target) == edit_completion(target, source, target) == 1
    assert edit_completion(source, source, target) == 0
    assert edit_completion(short, source, target) == pytest.approx(0.6)
    assert edit_completion(target, source, source) is None  # nothing was to be changed
    short[2] = target[2, 1:] = 0
    target[2, 0, 1:] = 0  # one pixel of 100 is the fewest that count, and here it is not done
    assert edit_completion(short, source, target) == 0
    target[2] = 0
    assert edit_completion(short, source, target) == pytest.approx(0.6)


def test_the_worst_frame_is_compared_with_its_own_ceiling():
    target, mask = torch.full((3, 10, 10, 3), 0.5), torch.zeros(3, 10, 10, dtype=torch.bool)
    mask[:2, :5] = True
    frames, ceiling = (target + torch.tensor(errors).view(3, 1, 1, 1) for errors in ((0.1, 0.2, 0.5), (0.01, 0.16, 0.5)))
    assert psnr_by_frame(frames, target, mask) == [db(0.1), db(0.2), None]  # the edit does not touch the last frame
    figures = worst_frame(frames, ceiling, target, mask)
    assert figures["psnr_worst_frame"] == db(0.2) and figures["psnr_worst_frame_ceiling"] == db(0.16)
    assert figures["worst_frame_gap"] == pytest.approx(20, abs=1e-3)  # of frame 0
    assert worst_frame(frames, ceiling, target, mask & False) == dict.fromkeys(figures)


def test_the_gap_of_the_first_frame():
    target = torch.full((4, 4, 3), 0.5)
    assert first_frame_gap(target + 0.2, target, target + 0.1) == pytest.approx(20 * math.log10(2), abs=1e-4)
    assert first_frame_gap(target + 0.1, target, target + 0.1) == 0 and first_frame_gap(target * math.nan, target, target) is None


def test_a_reference_shows_an_edit_if_a_pixel_differs_by_more_than_rounding():
    source = torch.full((2, 4, 4, 3), 0.5)
    edited = source[0].clone()
    assert not shows_edit(edited + 0.5 / 255, source)
    edited[0, 0, 0] += 2 / 255
    assert shows_edit(edited, source)
