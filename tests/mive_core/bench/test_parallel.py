"""The estimate of edits over several cards."""

import json
from itertools import pairwise

import pytest

from mive_core.bench.parallel import parallel_report
from mive_core.cli import main
from mive_core.config import PRESETS
from mive_core.cost.flops import dit_flops
from mive_core.train.budget import clip_layout


def test_cards_share_the_work():
    report = parallel_report()
    rows = report["rows"]
    assert [row["cards"] for row in rows] == [1, 2, 4, 8] and report["tokens"] == clip_layout((1280, 720), 81).num_tokens
    peak = 989e12 * report["assumed_share_of_peak"]
    assert rows[0]["seconds_a_forward"] == pytest.approx(dit_flops(PRESETS["14b"], clip_layout((1280, 720), 81)) / peak)
    assert all(1 < row["speedup"] < row["cards"] for row in rows[1:])
    for less, more in pairwise(rows):
        assert more["memory_bytes"]["first"] < less["memory_bytes"]["first"] and more["seconds_a_forward"] < less["seconds_a_forward"]
        assert report["weight_bytes"] < more["memory_bytes"]["others"] < more["memory_bytes"]["first"]


def test_numbers_that_do_not_divide_the_heads_are_left_out():
    assert [row["cards"] for row in parallel_report("1.3b")["rows"]] == [1, 2, 4]


def test_without_nvlink_exchanges_take_longer():
    slow, fast = (parallel_report(card=card)["rows"][1] for card in ("RTX 4090", "H100"))
    assert slow["exchanged_bytes"] == fast["exchanged_bytes"] and slow["seconds"]["exchanging"] > 10 * fast["seconds"]["exchanging"]


def test_from_the_command_line(tmp_path, capsys):
    assert main(["bench", "parallel", "--size", "832x480", "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["size"] == [832, 480] and report["command"].startswith("mive bench parallel")
    assert json.loads(capsys.readouterr().out)["rows"] == report["rows"]


@pytest.mark.parametrize("options", [["--size", "1280x721"], ["--frames", "80"]])
def test_sizes_that_do_not_fit(capsys, options):
    assert main(["bench", "parallel", *options]) == 2
    assert "the size does not fit" in capsys.readouterr().err
