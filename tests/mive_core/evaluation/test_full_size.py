"""What eval says of the delivered edit, at the source's own size, and of the baselines beside it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mive_core.cli import main
from mive_core.config import PRESETS, MiVEConfig
from mive_core.data.manifest import ManifestPairs, export_pairs, read_manifest
from mive_core.embedded.heldout import look_strength_pairs
from mive_core.evaluation.evaluate import DELIVERY_FIGURES, EvaluationSettings, evaluate
from mive_core.evaluation.full_size import FullSizePairs, colour_match, flow_reference
from mive_core.evaluation.metrics import FIGURES, is_nearest, psnr
from mive_core.evaluation.optical_flow import warp
from mive_core.media.fit import resize
from mive_core.types import Clip, EditRequest, PairedEdit

CLIPS = 2


class ExactVAE:
    """Its latents are the pixels."""

    def encode(self, frames):
        return frames

    def decode(self, latents):
        return latents


class CarryingPipeline:
    """An editor for scenes that stand still: it adds to every frame what the reference adds to the first."""

    def __init__(self):
        self.vae, self.config, self.requests = ExactVAE(), PRESETS["tiny"], []

    def edit(self, request, **_):
        self.requests.append(request)
        frames = request.source.frames
        return Clip((frames + request.reference - frames[0]).clamp(0, 1), request.source.fps)


def texture(height: int, width: int, coarse: int) -> torch.Tensor:
    """(height, width, 3) in 0.1..0.8: random, smooth over `coarse` pixels."""
    values = torch.rand(height // coarse, width // coarse, 3, generator=torch.Generator().manual_seed(0))
    return 0.1 + 0.7 * resize(values, (width, height))


def pair(size: tuple[int, int], amount: float = 0.15, name: str = "", target: bool = True) -> PairedEdit:
    """A still scene of five frames and size (width, height), whose left half becomes lighter."""
    source = texture(size[1], size[0], 1).expand(5, -1, -1, -1).clone()
    truth, mask = source.clone(), torch.zeros(source.shape[:3], dtype=torch.bool)
    truth[:, :, : size[0] // 2] += amount
    mask[:, :, : size[0] // 2] = True
    return PairedEdit(EditRequest(Clip(source, 8.0), truth[0], "lighten the left half"), truth if target else None, mask, name)


@pytest.fixture
def stored(tmp_path) -> Path:
    """The manifest of two pairs of 64x32."""
    return export_pairs(((pair((64, 32), name=str(i)), {"kind": "still", "edit": f"edit {i}"}) for i in range(CLIPS)), tmp_path / "set")


def report_of(stored: Path, pipeline, size=None, settings=EvaluationSettings(), full_size: bool = True) -> dict:
    entries = read_manifest(stored)
    return evaluate(
        pipeline,
        ManifestPairs(entries, size),
        stored.parent / "out",
        settings,
        groups={"kind": [entry.kind for entry in entries], "edit": [entry.edit for entry in entries]},
        full_size=FullSizePairs(ManifestPairs(entries, full_size=True), size) if full_size else None,
    )


def test_delivery_is_measured_at_the_sources_own_size(stored):
    pipeline = CarryingPipeline()
    report = report_of(stored, pipeline, (32, 16))
    assert [request.source.frames.shape for request in pipeline.requests] == [(5, 16, 32, 3)] * CLIPS  # one edit serves both
    raw = report_of(stored, CarryingPipeline(), (32, 16), full_size=False)
    assert [report[key] for key in FIGURES] == [raw[key] for key in FIGURES] and not set(DELIVERY_FIGURES) & set(raw)
    for figures in (report, report["by_kind"]["still"], report["by_edit"]["edit 1"], report["per_clip"][0]):
        assert all(figures[name].keys() == set(FIGURES) for name in DELIVERY_FIGURES)
    enlarged = torch.stack([resize(frame, (64, 32)) for frame in pipeline.edit(pipeline.requests[0]).frames])
    full = pair((64, 32))
    assert report["delivered"]["psnr_edited"] > 25 > psnr(enlarged, full.target, full.mask)
    assert report["round_trip"] == report["copy_source"]  # an exact VAE


def test_a_size_that_the_model_does_not_know_best_is_edited_again(stored):
    pipeline = CarryingPipeline()
    pipeline.config = MiVEConfig(edit_pixels=32 * 16)
    report = report_of(stored, pipeline)
    assert [request.source.frames.shape[1:3] for request in pipeline.requests] == [(32, 64), (16, 32)] * CLIPS
    assert report["psnr"] > report["delivered"]["psnr"]


def test_sizes_that_the_model_cannot_take_are_delivered_whole(tmp_path):
    stored = export_pairs([(pair((75, 40)), {"kind": "still", "edit": "lighten"})], tmp_path / "set")
    pipeline = CarryingPipeline()
    with pytest.warns(UserWarning, match="75x40 is scaled and cropped to 80x48"):
        report = report_of(stored, pipeline)
    full = ManifestPairs(read_manifest(stored), full_size=True)[0]
    assert full.target.shape == full.request.source.frames.shape == (5, 40, 75, 3)
    assert full.request.reference.shape == (40, 75, 3) and full.mask.shape == (5, 40, 75)
    assert pipeline.requests[1].source.frames.shape[1:3] == (32, 64)  # in nearly its shape, and no larger
    assert report["delivered"]["psnr"] > 25


def test_ablations_reach_delivery(stored):
    pipeline = CarryingPipeline()
    report = report_of(stored, pipeline, (32, 16), EvaluationSettings(reference_mode="source_frame", instruction_mode="empty"))
    assert len(pipeline.requests) == CLIPS and {request.instruction for request in pipeline.requests} == {""}
    assert report["delivered"]["psnr_kept"] > 50 and report["delivered"]["psnr_edited"] == pytest.approx(-20 * np.log10(0.15), abs=0.1)
    assert report["colour_match"]["psnr_edited"] > report["delivered"]["psnr_edited"]  # baselines keep the real reference


def test_without_a_target_there_is_no_figure(tmp_path):
    stored = export_pairs([(pair((32, 32), target=False), {"kind": "still", "edit": ""})], tmp_path / "set")
    report = report_of(stored, CarryingPipeline())
    assert report["delivered"] == report["flow_reference"] == dict.fromkeys(FIGURES)


def test_a_colour_match_carries_a_look():
    source = torch.stack([texture(40, 48, 4).roll(shift, 1) for shift in range(3)])
    target = source.square()[..., [2, 0, 1]]
    everywhere = torch.ones(source.shape[:3], dtype=torch.bool)
    assert psnr(colour_match(source, target[0]), target, everywhere) > 30


def test_flow_carries_what_the_reference_changes():
    wide = texture(48, 96, 8)
    source = torch.stack([wide[:, 10 + 3 * i : 74 + 3 * i] for i in range(4)])
    target, mask = source.clone(), torch.zeros(source.shape[:3], dtype=torch.bool)
    for i in range(4):  # a patch of the moving scene
        target[i, 16:36, 30 - 3 * i : 50 - 3 * i, 0] = 1.0
        mask[i, 16:36, 30 - 3 * i : 50 - 3 * i] = True
    carried = flow_reference(source, target[0])
    assert torch.equal(carried[0], target[0])
    still = (source + target[0] - source[0]).clamp(0, 1)
    assert psnr(carried[1:], target[1:], mask[1:]) > psnr(still[1:], target[1:], mask[1:]) + 5


def test_warping_reads_where_the_flow_points():
    image = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    flow = np.zeros((2, 4, 6))
    flow[0], flow[1] = 1, 2  # 2 rows and 4 columns of the image, which is twice as large
    assert torch.allclose(warp(image, flow)[:6, :8].movedim(-1, 0), image[0, :, 2:, 4:], atol=1e-5)


def test_strengths_are_right_where_the_own_target_is_nearest(tmp_path):
    clip = Clip(texture(32, 32, 4).expand(5, -1, -1, -1), 8.0)
    pairs = [item for item in look_strength_pairs(clip) if item[1]["edit"] == "duotone"]
    stored = export_pairs(pairs, tmp_path / "set")
    report = report_of(stored, CarryingPipeline())
    assert report["strength_right"] == {"clips": 4, "right": 4, "by_look": {"duotone": 4}}
    assert all(row["strength_right"] for row in report["per_clip"]) and report["by_kind"]["look strengths"]["clips"] == 4


def test_nearest():
    frames = torch.full((1, 2, 2, 3), 0.5)
    assert is_nearest(frames, frames + 0.1, [frames + 0.2, frames - 0.3]) is True
    assert is_nearest(frames, frames + 0.1, [frames - 0.05]) is False
    assert is_nearest(frames, frames + 0.1, [None]) is None


def test_the_command_delivers_unless_told_not_to(stored, random_models, capsys):
    arguments = ["eval", "--manifest", str(stored), "--output", str(stored.parent / "out"), "--models", str(random_models), "--size", "32x16"]
    assert main(arguments) == 0
    report = json.loads((stored.parent / "out" / "report.json").read_text())
    assert set(DELIVERY_FIGURES) <= report.keys() and "strength_right" not in report
    assert main([*arguments, "--raw-only"]) == 0
    raw = json.loads((stored.parent / "out" / "report.json").read_text())
    assert not set(DELIVERY_FIGURES) & raw.keys() and [raw[key] for key in FIGURES] == [report[key] for key in FIGURES]
