"""Long clips: the three ways run, and the figures tell a seam and a drift from none."""

from dataclasses import replace

import pytest
import torch

from mive_core.bench.long_clips import WAYS, bench_long_clips, score
from mive_core.errors import UserError
from mive_core.evaluation.evaluate import EvaluationSettings
from mive_core.evaluation.metrics import PSNR_CAP
from mive_core.pipeline import Pipeline
from mive_core.types import Clip, EditRequest, PairedEdit


def make_pair(num_frames: int = 17) -> PairedEdit:
    frames = torch.rand(num_frames, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(num_frames, 32, 48, dtype=torch.bool)
    mask[:, :16] = True
    target = torch.where(mask[..., None], 1 - frames, frames)
    return PairedEdit(EditRequest(Clip(frames, 8.0), target[0], "make it night"), target, mask, "noise")


def test_every_way_gives_figures_of_the_whole_clip(random_models):
    pipeline = Pipeline.load(random_models)
    pipeline = replace(pipeline, config=replace(pipeline.config, edit_frames=9))
    report = bench_long_clips(pipeline, [make_pair()], EvaluationSettings(steps=1))
    assert [row["way"] for row in report["clips"]] == list(WAYS) and report["edit_frames"] == 9
    assert {row["way"]: row["borders"] for row in report["clips"]} == {"stretches": [9], "windows": [5], "latents": [9]}
    for row in (*report["clips"], *report["means"]):
        assert row["frames"] == 17 and row["seconds"] > 0 and row["processor_seconds"] > 0
        for kind in ("raw", "delivered"):
            assert all(0 < value < PSNR_CAP for part in row[kind]["psnr"].values() for value in part.values()) and len(row[kind]["psnr"]) == 4
            assert row[kind]["seams"]["borders"] > 0 and row[kind]["seams"]["elsewhere"] > 0
    first, second = report["clips"][0], report["clips"][1]
    assert first["peak_bytes"] >= 0 and second["peak_bytes"] is None
    assert first["raw"]["psnr"]["whole"] != second["raw"]["psnr"]["whole"]


def test_a_seam_and_a_drift_are_seen_where_they_are():
    pair = make_pair()
    perfect = score(pair, pair.target, [9])
    assert perfect["psnr"]["last"]["psnr"] == PSNR_CAP and perfect["seams"] == {"borders": 0.0, "elsewhere": 0.0}
    jump = pair.target.clone()
    jump[9:] += 0.1
    seen = score(pair, jump, [9])
    assert seen["seams"]["borders"] == pytest.approx(25.5, rel=1e-3) and seen["seams"]["elsewhere"] == pytest.approx(0, abs=1e-3)
    assert seen["psnr"]["first"]["psnr_kept"] == PSNR_CAP and seen["psnr"]["last"]["psnr_kept"] == pytest.approx(20, abs=1e-3)


def test_what_cannot_be(random_models):
    pipeline = Pipeline.load(random_models)
    with pytest.raises(UserError, match="unknown way; got leaps"):
        bench_long_clips(pipeline, [make_pair()], EvaluationSettings(), ["leaps"])
    with pytest.raises(UserError, match="the pair is of no use here.*got 17 frames"):
        bench_long_clips(pipeline, [make_pair()], EvaluationSettings(), ["windows"])
    with pytest.raises(UserError, match="got no target"):
        bench_long_clips(pipeline, [replace(make_pair(), target=None)], EvaluationSettings(), ["windows"])
