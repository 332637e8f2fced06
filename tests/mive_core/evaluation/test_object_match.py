"""Colour, place and shape of a drawn thing: each fault is seen by the measure that is for it, and an edit that only looks similar passes too."""

import math

import pytest
import torch

from mive_core.evaluation.object_match import ObjectMatch, centroids, match_object, mean_colour_distance

RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)
EVERYWHERE = torch.ones(3, 32, 32, dtype=torch.bool)


def clip(colour=None, rows=slice(8, 20), columns=slice(8, 20)):
    """Gray frames, with a rectangle of a colour that moves by a column a frame."""
    frames = torch.full((3, 32, 32, 3), 0.6)
    for index in range(3) if colour else ():
        frames[index, rows, columns.start + index : columns.stop + index] = torch.tensor(colour)
    return frames


def test_the_truth_is_like_itself():
    found = match_object(clip(RED), clip(), clip(RED), EVERYWHERE, RED)
    assert found == ObjectMatch(0.0, 0.0, 1.0) and found.matches


def test_a_texture_and_a_little_blur_count_against_nothing():
    worn = clip(RED) + 0.1 * torch.randn(3, 32, 32, 3, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5)
    found = match_object(worn, clip(), clip(RED), EVERYWHERE, RED)
    assert found.matches and found.colour_distance < 0.05 and found.centre_distance < 0.02 and found.iou > 0.9


@pytest.mark.parametrize(
    "result, wrong",
    [
        (clip(BLUE), ("colour", "place", "shape")),  # not found at all
        (clip((0.9, 0.3, 0.25)), ("colour",)),  # found, and of another tone
        (clip(RED, columns=slice(11, 23)), ("place", "shape")),  # its own colour all the same
        (clip(RED, rows=slice(11, 17), columns=slice(5, 23)), ("shape",)),  # as large, in the same place
        (clip(), ("colour", "place", "shape")),
    ],
)
def test_each_fault_is_seen(result, wrong):
    found = match_object(result, clip(), clip(RED), EVERYWHERE, RED)
    bounds = {"colour": found.colour_distance > 0.15, "place": found.centre_distance > 0.05, "shape": found.iou < 0.75}
    assert not found.matches and tuple(name for name, off in bounds.items() if off) == wrong


def test_a_square_is_no_cross_of_its_colour():
    cross = clip(RED, rows=slice(12, 16), columns=slice(8, 20))
    cross[:, 8:20] = torch.where(clip(RED, columns=slice(12, 16))[:, 8:20] == torch.tensor(RED), torch.tensor(RED), cross[:, 8:20])
    assert match_object(clip(RED), clip(BLUE), cross, EVERYWHERE, RED).iou < 0.6


def test_a_removed_thing_has_to_be_gone():
    gone, half = clip(), clip(RED)
    half[:, :14] = 0.6
    assert match_object(gone, clip(RED), clip(), EVERYWHERE, RED) == ObjectMatch(None, remaining=0.0)
    assert match_object(half, clip(RED), clip(), EVERYWHERE, RED).remaining == 0.5 and not match_object(half, clip(RED), clip(), EVERYWHERE, RED).matches


def test_only_the_edited_region_is_looked_at():
    mask = torch.zeros_like(EVERYWHERE)
    mask[:, 6:24, 6:24] = True
    twin = clip(RED)
    twin[:, 27:, 27:] = torch.tensor(RED)
    assert match_object(twin, clip(), clip(RED), mask, RED).matches and not match_object(twin, clip(), clip(RED), EVERYWHERE, RED).matches


def test_what_is_not_measured_is_none():
    """Looks and edits without a colour were called right by their mean colour alone, 15 of 16 of them where `edit_completion` found 5."""
    assert match_object(clip(RED), clip(RED), clip(RED), EVERYWHERE, None) is None
    assert match_object(clip(RED), clip(BLUE), clip(BLUE), EVERYWHERE, RED) is None  # nothing of that colour, before or after


def test_mean_colours_have_a_figure_of_their_own():
    assert mean_colour_distance(clip(RED), clip(RED), EVERYWHERE) == 0
    assert mean_colour_distance(torch.full((3, 32, 32, 3), 0.5), torch.full((3, 32, 32, 3), 0.6), EVERYWHERE) == pytest.approx(0.1 * 3**0.5)
    assert mean_colour_distance(clip(RED), clip(RED), ~EVERYWHERE) is None


def test_what_is_not_finite_is_not_right():
    broken = torch.full((3, 32, 32, 3), math.nan)
    found = match_object(broken, clip(), clip(RED), EVERYWHERE, RED)
    assert not found.matches and math.isfinite(found.colour_distance)
    assert 1 < mean_colour_distance(broken, clip(RED), EVERYWHERE) < math.inf


def test_centres():
    things = torch.zeros(1, 8, 8, dtype=torch.bool)
    things[0, 2:4, 4:7] = True
    assert centroids(things).tolist() == [[2.5, 5.0]]
