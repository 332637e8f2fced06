"""The run that measures a card, at small shapes on a CPU: the same parts in the same order, and what is left out where time or memory ends."""

import json
from dataclasses import replace

import pytest
import torch

from mive_core.bench import card_all
from mive_core.bench.card_all import SCALES, TINY, Part, bench_card_all, edit_part, plan, run_part, scaled_vae_flops, training_part
from mive_core.bench.card_goals import GOALS
from mive_core.bench.models import Workload
from mive_core.bench.stage import vae_flops
from mive_core.config import PRESETS
from mive_core.errors import UserError

CPU = torch.device("cpu")


def real_work() -> Workload:
    return Workload(PRESETS["14b"], (1280, 720), 81, CPU, torch.bfloat16)


@pytest.mark.slow
def test_a_small_run_measures_everything():
    report = bench_card_all("cpu", scale="small", budget=200)
    parts = report["parts"]
    assert list(parts)[:3] == ["large_96x64_bf16", "large_96x64_fp8", "training_block"] and report["left_out"] == {}
    assert not [name for name, figures in parts.items() if "failed" in figures], parts
    for name, figures in parts.items():
        assert figures["seconds"] > 0 and figures["seconds_to_measure"] < report["seconds_in_all"], name
    for size in ("96x64", "64x48"):
        assert parts[f"large_{size}_fp8"]["weight_bytes"] < 0.6 * parts[f"large_{size}_bf16"]["weight_bytes"]
    assert parts["large_96x64_bf16"]["step_bytes"] == pytest.approx(parts["large_96x64_bf16_whole"]["step_bytes"], rel=0.01)
    assert sum(parts["large_96x64_bf16"]["shares_of_time"].values()) == pytest.approx(1)
    assert parts["edit"]["steps"] == 4 and parts["edit"]["denoise"]["flops"] > 4 * 1e6
    assert set(parts["stages"]["stage_seconds"]) == {"vlm", "encode", "decode", "decode_tiled"}
    assert report["device"]["name"] == "cpu" and report["software"]["torch"] == torch.__version__ and report["speed"]["flops_per_second"] > 1e8
    assert len(report["goals"]) == len(GOALS) and {entry["reached"] for entry in report["goals"]} == {None}
    unmeasured = [entry["goal"] for entry in report["goals"] if entry["figure"] is None]
    assert unmeasured == ["training step of a 14B block, MFU"]  # no peak is known of a CPU
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_what_no_longer_fits_into_the_time_is_left_out_and_smaller_parts_still_run(monkeypatch):
    long, short = Part(lambda: {"seconds": 1.0}, flops=1e30), Part(lambda: {"seconds": 2.0})
    monkeypatch.setattr(card_all, "plan", lambda scale, base: {"long": long, "short": short})
    report = bench_card_all("cpu", scale="small", budget=30)
    assert report["parts"]["long"]["estimated_seconds"] > 1e10 and "seconds" not in report["parts"]["long"]
    assert report["left_out"].keys() == {"long"} and "s of the budget were left" in report["left_out"]["long"]
    assert report["parts"]["short"]["seconds"] == 2.0


def test_real_shapes_on_a_cpu_end_at_once():
    """Each part is estimated to take hours there."""
    speed = 1e11
    skipped = {name: run_part(part, CPU, speed, 400.0)["skipped"] for name, part in plan(SCALES["real"], real_work()).items()}
    assert {"14b_1280x720_bf16", "14b_832x480_fp8", "training_block", "edit", "14b_1280x720_bf16_whole", "1.3b_1280x720_bf16", "stages"} <= skipped.keys()


def test_what_does_not_fit_into_memory_is_reported_with_the_need(monkeypatch):
    monkeypatch.setattr(card_all, "free_bytes", lambda device: 24_000_000_000)
    parts = plan(SCALES["real"], real_work())
    figures = run_part(parts["14b_1280x720_bf16_whole"], CPU, 1e15, 1e9)
    assert figures == {"skipped": "needs 26.5 GB, 24.0 GB were free", "needed_bytes": figures["needed_bytes"], "free_bytes": 24_000_000_000}
    assert 26.2e9 < figures["needed_bytes"] < 28e9
    assert parts["14b_1280x720_fp8_whole"].needed_bytes < 20e9 and parts["14b_1280x720_bf16"].needed_bytes < 12e9


def test_the_training_step_takes_the_longest_clip_whose_memory_is_free(monkeypatch):
    works = [real_work(), replace(real_work(), size=(832, 480))]
    needed = []
    for free in (80_000_000_000, 24_000_000_000, 1_000_000_000):
        monkeypatch.setattr(card_all, "free_bytes", lambda device, free=free: free)
        needed.append(training_part(works).needed_bytes)
    assert 25e9 < needed[0] < 28e9 and 11e9 < needed[1] < 13e9 and needed[2] == needed[1]


def test_a_part_that_fails_costs_no_other(monkeypatch):
    def broken() -> dict:
        raise AssertionError("a kernel that is not there\nand a long story")

    monkeypatch.setattr(card_all, "plan", lambda scale, base: {"broken": Part(broken), "next": Part(lambda: {"seconds": 2.0})})
    report = bench_card_all("cpu", scale="small", budget=30)
    assert report["parts"]["broken"]["failed"] == "AssertionError: a kernel that is not there" and report["parts"]["next"]["seconds"] == 2.0


def test_the_edit_is_the_1_3b_with_the_2b_and_wans_vae():
    work = replace(real_work(), config=SCALES["real"].edit, size=(832, 480))
    weights = 2 * (2.127e9 + 1.4e9)
    assert weights < edit_part(work).needed_bytes < weights + 8e9
    assert work.vlm_config["vision_config"]["depth"] == 24 and work.config.width == PRESETS["1.3b"].width


def test_the_vaes_operations_grow_with_the_pixels():
    """Attention in its middle adds a little."""
    work = Workload(TINY, (256, 192), 33, CPU, torch.float32)
    factor = card_all.SHARE_OF_SPEED / card_all.VAE_SHARE
    for name, flops in scaled_vae_flops(work).items():
        assert flops / factor == pytest.approx(vae_flops(work)[name], rel=0.1)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"scale": "huge"}, "unknown scale; got huge; expected real or small"),
        ({"budget": 5.0}, "the budget is too small to measure anything; got 5 s; expected 20 s or more"),
        ({"budget": float("nan")}, "the budget is too small"),
    ],
)
def test_bad_settings_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        bench_card_all("cpu", **{"scale": "small"} | settings)
