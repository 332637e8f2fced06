"""A reference that an image editor moved comes back over the source's first frame; one that fits stays the same tensor."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.registration import phase_cross_correlation
from torch.nn import functional as F

import mive_core
from mive_core.embedded.synthetic import PairedEdits, apply_look
from mive_core.media.video import read_clip
from mive_core.registration import register

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"
GAIN, OFFSET = torch.tensor([1.06, 0.97, 0.92]), torch.tensor([-0.02, 0.01, 0.03])  # a colour cast


@pytest.fixture(scope="module")
def frame():
    return read_clip(SAMPLE).frames[16]


def recoloured(frame: torch.Tensor) -> torch.Tensor:
    edited = frame.clone()
    edited[30:80, 60:120] = edited[30:80, 60:120][..., [2, 0, 1]]
    return edited


def pasted(frame: torch.Tensor) -> torch.Tensor:
    """An object with edges of its own."""
    edited = frame.clone()
    y, x = torch.meshgrid(torch.arange(112), torch.arange(192), indexing="ij")
    inside = (y - 60).square() + (x - 70).square() < 28**2
    edited[inside] = (((x + y) // 5 % 2)[inside] * 0.6 + 0.2)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    return edited


def shifted(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    rows, columns = (torch.arange(112) - down).clamp(0, 111), (torch.arange(192) - right).clamp(0, 191)
    return image[rows][:, columns]


def zoomed(image: torch.Tensor, zoom: float) -> torch.Tensor:
    grid = F.affine_grid(torch.tensor([[[1 / zoom, 0, 0], [0, 1 / zoom, 0]]]), [1, 3, 112, 192], align_corners=False)
    return F.grid_sample(image.movedim(-1, 0)[None], grid, mode="bicubic", align_corners=False)[0].movedim(0, -1).clamp(0, 1)


def compressed(image: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    Image.fromarray((image * 255).round().to(torch.uint8).numpy()).save(file, "JPEG", quality=25)
    return torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b)[10:-10, 10:-10].square().mean().log10()).item()


EDITS = {
    "night": lambda frame: apply_look("night", frame),
    "invert": lambda frame: apply_look("invert", frame),
    "contrast": lambda frame: apply_look("contrast", frame),
    "recoloured": recoloured,
    "pasted": pasted,
}
MOTIONS = {
    "2 px": lambda image: shifted(image, 2, -2),
    "4 px": lambda image: shifted(image, 0, 4),
    "8 px": lambda image: shifted(image, -8, 8),
    "zoom 1.05": lambda image: zoomed(image, 1.05),
    "zoom 0.95": lambda image: zoomed(image, 0.95),  # with black borders
    "zoom and shift": lambda image: shifted(zoomed(image, 1.04), 3, 4),
}


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_moved_reference_comes_back(frame, edit, motion):
    reference = EDITS[edit](frame)
    registered = register(MOTIONS[motion](reference), frame)
    assert psnr(registered, reference) > 28
    shift = phase_cross_correlation(reference[10:-10, 10:-10].mean(-1).numpy(), registered[10:-10, 10:-10].mean(-1).numpy(), upsample_factor=20)[0]
    assert np.abs(shift).max() < 0.25


def test_past_the_border_of_a_moved_reference_stands_what_was_given(frame):
    beyond = torch.full_like(frame, 0.5)
    registered = register(shifted(frame, 8, 8), frame, beyond)
    assert torch.equal(registered[-7:], beyond[-7:]) and torch.equal(registered[:, -7:], beyond[:, -7:])
    assert psnr(registered[:-10, :-10], frame[:-10, :-10]) > 28 and register(frame, frame, beyond) is frame


@pytest.mark.slow
@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_jpeg_is_as_good_as_one_that_was_not_moved(frame, edit, motion):
    reference = EDITS[edit](frame)
    assert psnr(register(compressed(MOTIONS[motion](reference)), frame), reference) > psnr(compressed(reference), reference) - 1


@pytest.mark.parametrize("edit", EDITS)
def test_a_reference_that_fits_stays_the_same(frame, edit):
    for reference in (EDITS[edit](frame), compressed(EDITS[edit](frame)), EDITS[edit](frame) * GAIN + OFFSET):
        assert register(reference, frame) is reference


@pytest.mark.slow
def test_no_kind_of_edit_is_taken_for_a_motion():
    edits = PairedEdits(5, "heldout", (128, 128), 5)
    for request in (edits.sample(index).pair.request for index in range(24)):
        assert register(request.reference, request.source.frames[0]) is request.reference
        jpeg = compressed(request.reference)
        assert register(jpeg, request.source.frames[0]) is jpeg


def test_another_picture_and_a_flat_one_stay_the_same(frame):
    edits = PairedEdits(7, "train", (192, 112), 5)
    for other in (*(edits.sample(index).pair.request.reference for index in range(8)), torch.full_like(frame, 0.5)):
        assert register(other, frame) is other
        assert register(frame, other) is frame
