"""A reference that an image editor moved by a little comes back over the source's first frame; one that fits stays as it is."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mive_core
from mive_core.embedded.synthetic import PairedEdits, apply_look
from mive_core.media.video import read_clip
from mive_core.registration import register, warp

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_640x360.mp4"


@pytest.fixture(scope="module")
def frame():
    return read_clip(SAMPLE, num_frames=1).frames[0]


def pasted(frame: torch.Tensor) -> torch.Tensor:
    edited = frame.clone()
    edited[100:240, 200:350] = torch.tensor([0.9, 0.2, 0.1])
    return edited


EDITS = {"night": lambda frame: apply_look("night", frame), "invert": lambda frame: 1 - frame, "pasted": pasted}


def inner_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b)[24:-24, 24:-24].square().mean().log10()).item()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("zoom, shift", [(1.0, (0, 2)), (1.0, (3, -4)), (1.0, (-8, 5)), (1.05, (0, 0)), (0.95, (2, 1))])
def test_a_moved_reference_comes_back(frame, edit, zoom, shift):
    reference = EDITS[edit](frame)
    moved = warp(reference.movedim(-1, 0)[None], zoom, shift, "bicubic")[0].movedim(0, -1).clamp(0, 1)
    assert inner_psnr(register(moved, frame), reference) > max(30, inner_psnr(moved, reference) + 8)


@pytest.mark.parametrize("edit", EDITS)
def test_a_reference_that_fits_stays_as_it_is_compressed_or_not(frame, edit):
    reference = EDITS[edit](frame)
    assert register(reference, frame) is reference
    file = io.BytesIO()
    Image.fromarray((reference * 255).round().to(torch.uint8).numpy()).save(file, "JPEG", quality=25)
    compressed = torch.from_numpy(np.asarray(Image.open(file)).copy()).float() / 255
    assert register(compressed, frame) is compressed


def test_no_edit_of_any_kind_is_taken_for_a_motion():
    """Another background, a removed or a new object: what changed of the structure pulls nothing along."""
    edits = PairedEdits(5, "heldout", (128, 128), 5)
    for request in (edits.sample(index).pair.request for index in range(16)):
        assert register(request.reference, request.source.frames[0]) is request.reference


def test_a_flat_picture_has_no_structure():
    flat = torch.full((64, 96, 3), 0.5)
    assert register(flat, flat) is flat
