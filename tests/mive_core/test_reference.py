"""Edited frames beside the first: where they stand, when frame 0 is fixed, and what is refused."""

from dataclasses import replace

import pytest
import torch

from mive_core.errors import UserError
from mive_core.flow import schedule
from mive_core.pipeline import Pipeline
from mive_core.reference import check_keyframes, fix_first_frame, latent_times, shows_edit, within_window
from mive_core.types import Clip, EditRequest, Keyframe


@pytest.fixture(scope="module")
def pipeline(random_models):
    return Pipeline.load(random_models)


def request(num_frames: int = 9, keyframes: tuple[Keyframe, ...] = ()) -> EditRequest:
    frames = torch.rand(num_frames, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    return EditRequest(Clip(frames, 8.0), 1 - frames[0], "make it night", keyframes)


def image(seed: int = 1) -> torch.Tensor:
    return torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(seed))


def test_the_middle_of_four_frames_is_their_latent_frame():
    times = latent_times(torch.tensor([0, 1, 2, 3, 4, 5, 8, 40]))
    assert times.tolist() == [0, 0.625, 0.875, 1.125, 1.375, 1.625, 2.375, 10.375]
    assert latent_times(torch.arange(1, 5)).mean() == 1 and latent_times(torch.arange(37, 41)).mean() == 10


def test_a_window_sees_the_reference_and_its_own_keyframes():
    reference, times = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 2, 4, 3, 3), torch.tensor([[0.0, 2.4, 5.1, 9.0]])
    inside, places = within_window(reference, times - 4, 5)
    assert places.tolist() == [[0.0, pytest.approx(1.1)]] and inside[0, 0, :, 0, 0].tolist() == [0, 2]


def test_a_reference_shows_an_edit_or_not():
    source = torch.randn(3, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    reference = source[:, :, :1].clone()
    reference[1] += 0.1 * torch.randn(16, 1, 6, 8)  # a recompressed picture
    reference[2, :, :, 2:5, 2:5] += 1.0
    assert shows_edit(reference, source).tolist() == [False, False, True]


def test_sampling_ends_at_the_reference_where_it_shows_an_edit(pipeline):
    fixing = replace(pipeline, config=replace(pipeline.config, fix_first_frame=True))
    free = replace(pipeline, config=replace(pipeline.config, fix_first_frame=False))
    latents, condition = pipeline.encode(request()), pipeline.vlm.condition(request(), pipeline.config)
    latents = replace(latents, reference=latents.source[:, :, :1] + 1)  # random weights give nearly equal latents
    with torch.inference_mode():
        fixed, other = (p.denoise(latents, [condition], schedule(3, 3.0), 1.0, seed=0) for p in (fixing, free))
        assert torch.allclose(fixed[:, :, :1], latents.reference, atol=1e-5) and not torch.allclose(other[:, :, :1], latents.reference, atol=0.1)
        same = replace(latents, reference=latents.source[:, :, :1])
        assert torch.equal(*(p.denoise(same, [condition], schedule(2, 3.0), 1.0, seed=0) for p in (fixing, free)))


def test_only_clips_whose_reference_shows_an_edit_are_fixed():
    velocity, x, source = (torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    reference = source[:, :, :1].clone()
    reference[1] += 1
    fixed = fix_first_frame(velocity, x, torch.tensor([0.5, 0.5]), source, reference)
    assert torch.equal(fixed[0], velocity[0]) and torch.equal(fixed[1, :, 1:], velocity[1, :, 1:])
    assert torch.allclose(x[1, :, :1] - 0.5 * fixed[1, :, :1], reference[1])


def test_a_keyframe_changes_the_edit_and_its_number_matters(pipeline):
    edits = [pipeline.edit(request(keyframes=keyframes), steps=1).frames for keyframes in ((), (Keyframe(4, image()),), (Keyframe(8, image()),))]
    assert not torch.equal(edits[0], edits[1]) and not torch.equal(edits[1], edits[2])


def test_in_a_long_clip_a_keyframe_counts_in_the_stretch_that_holds_its_frame(pipeline):
    """Stretches of 9 frames that share one, 0 to 8 and 8 to 16. A keyframe at a shared frame ends one and is the reference of the next."""
    long = replace(pipeline, config=replace(pipeline.config, edit_frames=9))
    plain, late, shared = (long.edit(request(17, keyframes), steps=1).frames for keyframes in ((), (Keyframe(13, image()),), (Keyframe(8, image()),)))
    assert torch.equal(plain[:9], late[:9]) and not torch.equal(plain[9:], late[9:])
    assert not torch.equal(plain[:9], shared[:9])
    later = replace(request(17), source=replace(request(17).source, frames=request(17).source.frames[8:]), reference=image())
    assert torch.equal(shared[9:], long.edit(later, steps=1).frames[1:])


@pytest.mark.parametrize(
    "numbers, taught, said",
    [([4], False, "was not taught keyframes"), ([0], True, "frame 0 is the reference"), ([9], True, "expected 1 to 8"), ([3, 3], True, "two keyframes")],
)
def test_keyframes_that_cannot_be(numbers, taught, said):
    with pytest.raises(UserError, match=said):
        check_keyframes(numbers, 9, taught)


def test_a_keyframe_of_another_size(pipeline):
    with pytest.raises(UserError, match="keyframe 4 and the source differ in size"):
        pipeline.edit(request(keyframes=(Keyframe(4, torch.rand(16, 16, 3)),)))


def test_an_untaught_checkpoint_refuses(pipeline):
    untaught = replace(pipeline, config=replace(pipeline.config, keyframes=False))
    with pytest.raises(UserError, match="was not taught keyframes"):
        untaught.edit(request(keyframes=(Keyframe(4, image()),)))
