"""The card's benchmark at small shapes on a CPU: every part runs, counts what it says, and goes on where something fails."""

import pytest
import torch

from mive_core.bench import card
from mive_core.bench.card import FORWARDS, PARTS, bench_card
from mive_core.config import PRESETS
from mive_core.errors import UserError

SMALL = dict(size=(96, 64), num_frames=5, device="cpu", dtype=torch.float32, repeats=1)


@pytest.mark.slow
def test_every_part_runs_and_is_held_against_the_devices_own_speed():
    quick = set(PARTS) - {"compiled"}  # which takes a compiler half a minute; test_compile.py compiles once
    report = bench_card("tiny", blocks=2, parts=tuple(quick), **SMALL)
    assert quick <= set(report)
    assert report["tokens"] == 3 * 8 * 12 + 3 * 8 * 12 // 19 and report["device"] == "cpu" and report["blocks"] == 2
    for part in ("dit", "training_block"):
        figures = report[part]
        assert figures["seconds"] > 0 and figures["flops_per_second"] == figures["flops"] / figures["seconds"]
        assert figures["roofline_seconds"] >= figures["flops"] / report["speed"]["flops_per_second"]
    assert report["dit"]["seconds_of_28"] == 28 * report["dit"]["seconds"]
    assert report["attention"]["chosen"]["flops"] == 4 * report["tokens"] ** 2 * PRESETS["tiny"].width
    assert any("relative_difference" in found and found["relative_difference"] < 1e-3 for found in report["attention"].values() if isinstance(found, dict))
    assert report["vlm"]["vlm_tokens"] > 10 and report["vlm"]["seconds"] > 0
    assert report["vae"]["decode"]["seconds"] > 0 and report["vae"]["decode_tiled"]["seconds"] > 0
    assert "failed" in report["dit_fp8"] or report["dit_fp8"]["weight_bytes"] < 0.6 * report["dit"]["weight_bytes"]
    whole = report["edit_seconds_by_forwards"]
    assert set(whole) == {str(count) for count in FORWARDS}
    assert whole["50"] - whole["30"] == pytest.approx(20 * report["dit"]["seconds"])
    assert sum(report[part]["seconds_to_measure"] for part in quick) <= report["seconds_in_all"]


def test_what_fails_is_said_and_the_rest_goes_on(monkeypatch):
    def full(work):
        raise torch.OutOfMemoryError("no more memory\nand a long story")

    monkeypatch.setitem(PARTS, "attention", full)
    report = bench_card("tiny", blocks=1, parts=("attention", "training_block"), **SMALL)
    assert report["attention"]["failed"] == "OutOfMemoryError: no more memory"
    assert report["training_block"]["seconds"] > 0 and "dit" not in report


def test_nothing_is_begun_after_the_limit():
    report = bench_card("tiny", blocks=1, parts=("training_block",), limit=0, **SMALL)
    assert report["training_block"] == {"skipped": "the time was used up"}


def test_the_1_3b_is_measured_beside_the_14b_alone():
    work = card.workload("1.3b", size=(32, 32), num_frames=1, blocks=1, repeats=1)
    assert card.measure_small_dit(work) == {}


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(parts=("paint",)), "unknown part; got paint"),
        (dict(num_frames=6), "the size does not fit; got 96x64x6"),
        (dict(size=(90, 64)), "the size does not fit"),
    ],
)
def test_bad_settings_are_refused(changed, said):
    with pytest.raises(UserError, match=said):
        bench_card("tiny", **SMALL | changed)


def test_a_missing_card_is_refused_with_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(UserError, match="no CUDA device.*take cpu"):
        bench_card("tiny", **SMALL | {"device": "cuda"})
