"""The goals for a card: what a report's figures make of them."""

import pytest

from mive_core.bench.card_goals import GOALS, goals, print_lines

FEW = "1 and 3 blocks"


def report(**changes) -> dict:
    """A run on an H100 that reaches every goal."""
    memory = {"step_bytes": 6.2e9, "counted_step_bytes": 6.0e9, "counted_peak_bytes": 26.2e9}
    parts = {
        "14b_1280x720_bf16": {"seconds": 8.9, "times_roofline": 1.2, "peak_bytes": 26.4e9, "from": FEW, "shares_of_time": {"rest": 0.07}} | memory,
        "14b_1280x720_fp8": {"seconds": 6.0, "times_roofline": 0.6, "peak_bytes": 16.5e9, "from": FEW, "multiplied": True},
        "training_block": {"mfu": 0.5, "tokens": 83368},
        "14b_1280x720_bf16_whole": {"seconds": 8.5, "times_roofline": 1.1, "peak_bytes": 26.5e9, "from": "all 40 blocks"} | memory,
        "stages": {"seconds": 15.0},
    }
    return {"scale": "real", "first": "14b_1280x720", "device": {"name": "NVIDIA H100 80GB HBM3"}, "parts": parts} | changes


def judged(changed: dict) -> dict[str, dict]:
    """The goals by the first words of their names."""
    short = ("forward", "fp8", "28", "14", "edit", "peak", "peak_fp8", "memory", "element", "training")
    return dict(zip(short, goals(changed), strict=True))


def with_part(name: str, **figures) -> dict:
    found = report()
    found["parts"][name] = found["parts"].get(name, {}) | figures
    return found


def test_a_fast_card_reaches_all():
    found = judged(report())
    assert [entry["reached"] for entry in found.values()] == [True] * len(GOALS)
    assert found["forward"]["figure"] == 1.1 and found["forward"]["from"] == "14b_1280x720_bf16_whole: all 40 blocks"
    assert found["28"]["figure"] == pytest.approx(28 * 8.5) and found["14"]["figure"] == pytest.approx(14 * 6.0)
    assert found["edit"]["figure"] == pytest.approx(15 + 4 * 6.0)  # in the fastest format
    assert found["memory"]["figure"] == pytest.approx(100 * (6.2 / 6.0 - 1)) and found["training"]["figure"] == 50.0


@pytest.mark.parametrize(
    "part, figures, goal",
    [
        ("14b_1280x720_bf16_whole", {"times_roofline": 1.16}, "forward"),
        ("14b_1280x720_fp8", {"times_roofline": 0.71}, "fp8"),
        ("14b_1280x720_bf16_whole", {"seconds": 8.6}, "28"),
        ("14b_1280x720_fp8", {"seconds": 8.6}, "14"),
        ("stages", {"seconds": 30.0}, "edit"),
        ("14b_1280x720_bf16_whole", {"peak_bytes": 41e9}, "peak"),
        ("14b_1280x720_fp8", {"peak_bytes": 23e9}, "peak_fp8"),
        ("14b_832x480_bf16", {"step_bytes": 8.9e9, "counted_step_bytes": 10e9}, "memory"),
        ("14b_1280x720_bf16", {"shares_of_time": {"rest": 0.09}}, "element"),
        ("training_block", {"mfu": 0.44}, "training"),
    ],
)
def test_each_goal_can_be_missed(part, figures, goal):
    entry = judged(with_part(part, **figures))[goal]
    assert entry["reached"] is False and entry["figure"] is not None


def test_a_figure_that_was_not_measured_decides_nothing():
    for entry in goals(report(parts={})):
        assert entry["figure"] is None and entry["reached"] is None and entry["note"] == "not measured here"


def test_other_products_than_float8s_are_no_fp8():
    found = judged(with_part("14b_1280x720_fp8", multiplied=False))
    assert (found["fp8"]["reached"], found["14"]["reached"], found["edit"]["figure"]) == (None, None, pytest.approx(15 + 4 * 8.5))


def test_8_bit_attention_counts_unless_it_fell_back():
    sage = {"seconds": 4.0, "times_roofline": 0.45, "from": FEW, "multiplied": True}
    assert judged(with_part("14b_1280x720_fp8_sage", **sage))["fp8"]["figure"] == 0.45
    assert judged(with_part("14b_1280x720_fp8_sage", **sage, warnings=["sage attention fails"]))["fp8"]["figure"] == 0.6


def test_compiled_blocks_count_where_eager_mode_leaves_too_much():
    """A tenth of eager's time was element-wise; compiled takes 0.93 of it, so at most 0.03 are left."""
    found = with_part("14b_1280x720_bf16", shares_of_time={"rest": 0.10})
    found["parts"]["compiled"] = {"time_ratio": 0.93}
    entry = judged(found)["element"]
    assert entry["reached"] and entry["figure"] == pytest.approx(100 * (1 - 0.9 / 0.93)) and entry["from"].endswith("compiled blocks")


def test_seconds_on_another_card_and_small_shapes_decide_nothing():
    other = judged(report(device={"name": "NVIDIA GeForce RTX 4090"}))
    assert other["28"]["reached"] is None and other["28"]["note"] == "a goal for the H100" and other["28"]["figure"] > 0 and other["forward"]["reached"]
    assert {entry["reached"] for entry in goals(report(scale="small"))} == {None}


def test_each_goal_is_one_printed_line():
    lines = print_lines(goals(with_part("14b_1280x720_fp8", times_roofline=0.71)))
    assert lines[0] == "reached: forward of the 14B, 83,400 tokens, bf16: 1.10 x the card's bf16 roofline (at most 1.15 x the card's bf16 roofline)"
    assert lines[1].startswith("missed: the same with fp8 products: 0.71 x") and len(lines) == len(GOALS)
    assert print_lines(goals(report(parts={})))[-1] == "open: training step of a 14B block, MFU: - (at least 45 %; not measured here)"
