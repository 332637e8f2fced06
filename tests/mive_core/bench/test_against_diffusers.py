"""The benchmark's report."""

import pytest

from mive_core.bench import against_diffusers as bench
from mive_core.errors import UserError


def test_report_has_the_ratio_and_its_goal():
    report = bench.bench_dit("tiny", tokens=160, blocks=1, repeats=2)
    assert report["time_over_flop_ratio"] == pytest.approx(report["time_ratio"] / report["flop_ratio"])
    assert 0.3 < report["flop_ratio"] < 1 and report["goal"] == 1.03


def test_unknown_preset():
    with pytest.raises(UserError, match="tiny"):
        bench.bench_dit("huge", tokens=100)
