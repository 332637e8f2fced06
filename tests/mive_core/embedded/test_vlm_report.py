"""The embedded VLM, on edits it has not seen."""

import pytest

from mive_core.embedded.vlm_examples import load_heads
from mive_core.embedded.vlm_report import FOLDER, measure
from mive_core.vlm import VLM


@pytest.fixture(scope="module")
def figures():
    vlm = VLM.load(FOLDER)
    return measure(vlm, load_heads(FOLDER, vlm.width).requires_grad_(False), "heldout", 24, ("seen in reference", "enters late"))


def test_the_embedded_vlm_names_edits(figures):
    assert figures["edit_accuracy"] > 0.7
    assert figures["new_colour_accuracy"] > 0.5
    assert figures["new_shape_accuracy"] > 0.5


def test_the_embedded_vlm_locates_edits(figures):
    assert figures["mask_iou"] > 0.25


def test_the_embedded_vlm_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4e6
