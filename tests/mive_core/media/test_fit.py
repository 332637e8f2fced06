import pytest
import torch

from mive_core.errors import UserError
from mive_core.media.fit import as_rgb, check_frames, check_request_frames, check_request_size, fit_clip, fit_mask, fit_reference, resize_and_crop
from mive_core.types import Clip


def gray(num_frames: int, height: int = 32, width: int = 48, value: float = 0.5) -> torch.Tensor:
    return torch.full((num_frames, height, width, 3), value)


@pytest.mark.parametrize("num_frames, kept", [(1, 1), (2, 1), (4, 1), (5, 5), (6, 5), (16, 13), (17, 17)])
def test_frames_are_trimmed_to_4n_plus_1(num_frames, kept, recwarn):
    frames = torch.rand(num_frames, 32, 48, 3)
    fitted = fit_clip(Clip(frames, 8.0))
    assert torch.equal(fitted.frames, frames[:kept]) and fitted.fps == 8.0
    said = [str(warning.message) for warning in recwarn]
    assert said == ([] if kept == num_frames else [f"source: the model takes 4n+1 frames; {num_frames} are trimmed to {kept}"])


@pytest.mark.parametrize("got, fits", [((48, 32), (48, 32)), ((50, 30), (48, 32)), ((1920, 1080), (1920, 1088)), ((17, 16), (16, 16))])
def test_sides_go_to_the_nearest_multiple_of_16(got, fits, recwarn):
    fitted = fit_clip(Clip(gray(1, got[1], got[0]), 8.0))
    assert fitted.frames.shape == (1, fits[1], fits[0], 3)
    assert torch.allclose(fitted.frames, torch.tensor(0.5), atol=1e-5)
    assert len(recwarn) == (got != fits)
    if got != fits:
        assert f"{got[0]}x{got[1]} is scaled and cropped to {fits[0]}x{fits[1]}" in str(recwarn[0].message)


@pytest.mark.parametrize("size, nearest", [((100, 96), "96x96"), ((96, 104), "96x112"), ((0, 96), "16x96"), ((20000, 96), "16384x96")])
def test_an_explicit_size_must_fit(size, nearest):
    with pytest.raises(UserError, match=f"got {size[0]}x{size[1]}; expected {nearest}, the nearest that fits"):
        fit_clip(Clip(gray(1), 8.0), size)
    check_request_size((96, 112))


@pytest.mark.parametrize("num_frames, nearest", [(2, "1 or 5"), (16, "13 or 17"), (0, "1 or 5"), (18, "17 or 21")])
def test_an_explicit_number_of_frames_must_fit(num_frames, nearest):
    with pytest.raises(UserError, match=f"expected {nearest}, the nearest that fit"):
        fit_clip(Clip(gray(30), 8.0), num_frames=num_frames)
    check_request_frames(17)


def test_a_clip_shorter_than_asked_is_refused_with_both_counts():
    with pytest.raises(UserError, match="got 8 frames; expected 17; ask for 5 or fewer"):
        fit_clip(Clip(gray(8), 8.0), num_frames=17)


def test_cover_keeps_the_aspect_ratio_and_the_centre():
    """A wide picture with a centred square: the square stays square and centred."""
    frames = torch.zeros(1, 64, 128, 3)
    frames[:, 16:48, 48:80] = 1
    small = resize_and_crop(frames, (32, 32))[0, ..., 0]
    rows, columns = (small > 0.5).any(1).nonzero(), (small > 0.5).any(0).nonzero()
    assert rows.min() == 8 and rows.max() == 23 and columns.min() == 8 and columns.max() == 23


def test_shrinking_is_antialiased():
    """A one-pixel checkerboard becomes gray, not a pattern."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float()[None, ..., None].repeat(1, 1, 1, 3)
    small = resize_and_crop(board, (16, 16))[0, 2:-2, 2:-2]
    assert (small - 0.5).abs().max() < 0.05


def test_no_frames_and_no_clip():
    with pytest.raises(UserError, match="0 frames"):
        fit_clip(Clip(gray(0), 8.0))
    with pytest.raises(UserError, match="shape"):
        check_frames(torch.zeros(32, 48, 3), "source")
    with pytest.raises(UserError, match="got 1x1"):
        check_frames(torch.zeros(1, 1, 1, 3), "source")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_pixels_are_refused_with_the_frame(value):
    frames = gray(9)
    frames[6, 3, 4, 2] = value
    with pytest.raises(UserError, match="got frame 6"):
        fit_clip(Clip(frames, 8.0))


def test_pixels_outside_are_clamped_with_a_warning():
    frames = gray(5)
    frames[2, 0, 0] = torch.tensor([-0.5, 0.5, 1.5])
    with pytest.warns(UserWarning, match="pixels from -0.5 to 1.5 are clamped"):
        fitted = fit_clip(Clip(frames, 8.0)).frames
    assert fitted[2, 0, 0].tolist() == [0, 0.5, 1]


def test_channels():
    assert as_rgb(torch.rand(2, 16, 16, 1), "x").shape == (2, 16, 16, 3)
    with pytest.warns(UserWarning, match="over black"):
        assert as_rgb(torch.full((1, 16, 16, 4), 0.5), "x").unique().tolist() == [0.25]
    with pytest.raises(UserError, match="2 channels"):
        as_rgb(torch.rand(2, 16, 16, 2), "x")


def test_a_reference_is_fitted_as_the_source_is(recwarn):
    source = torch.rand(1, 90, 160, 3)
    fitted = fit_clip(Clip(source, 8.0), (96, 64)).frames
    assert torch.equal(fit_reference(source[0], (96, 64)), fitted[0])
    assert torch.equal(fit_reference(source, (96, 64)), fitted[0])  # a batch of one
    assert len(recwarn) == 2 and "cropped at the centre" in str(recwarn[0].message)  # 16:9 to 3:2


def test_a_reference_that_is_cropped_as_its_source_is_raises_no_alarm(recwarn):
    fit_reference(gray(1, 64, 64)[0], (96, 48), source_size=(128, 128))
    assert not recwarn
    fit_reference(gray(1, 64, 64)[0], (96, 48), source_size=(128, 96))
    assert "cropped at the centre" in str(recwarn[0].message)


def test_a_reference_of_another_shape_is_cropped_with_a_warning():
    with pytest.warns(UserWarning, match="64x64 is cropped at the centre to the shape of 96x48"):
        assert fit_reference(gray(1, 64, 64)[0], (96, 48)).shape == (48, 96, 3)
    with pytest.raises(UserError, match="one reference is needed; got 2 images"):
        fit_reference(gray(2), (48, 32))
    with pytest.raises(UserError, match="got 1x1; expected sides of 16 to 16384"):
        fit_reference(torch.zeros(1, 1, 3), (48, 32))


def test_masks_are_cut_at_one_half():
    mask = torch.zeros(2, 64, 64, 3)
    mask[:, :, 32:] = 1
    fitted = fit_mask(mask, (32, 32))
    assert fitted.dtype == torch.bool and fitted.shape == (2, 32, 32)
    assert fitted[:, :, 16:].all() and not fitted[:, :, :16].any()
