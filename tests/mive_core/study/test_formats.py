"""The study of formats at its smallest: two formats, one clip."""

import pytest
import torch

from mive_core.study.formats import OUTSIDE, Variant, measure_formats
from mive_core.types import Clip, EditRequest, PairedEdit

pytest.importorskip("comfy_kitchen")


def test_coarser_formats_are_further_off_and_every_part_counts():
    frames = torch.rand(5, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    target = frames.clone()
    target[:, 8:24, 8:24] = torch.tensor([0.9, 0.1, 0.1])
    pair = PairedEdit(EditRequest(Clip(frames, 8.0), target[0], "make it red"), target, (frames != target).any(-1))
    reports = []
    measure_formats([pair], reports.append, variants=[Variant("int8"), Variant("nvfp4"), Variant("nvfp4", 2)])
    rows, parts = reports[-1]["variants"], reports[-1]["single_layers"]
    int8, nvfp4, ends_kept = (row["forward_error"] for row in rows)
    assert len(reports) == 3 and 0 < int8 < ends_kept < nvfp4 and rows[1]["bytes"] < rows[2]["bytes"] < reports[-1]["plain"]["bytes"]
    assert parts.keys() >= {*OUTSIDE, "block 0", "block 11", "ffn.0"} and all(0 < error < nvfp4 * 3 for error in parts.values())
