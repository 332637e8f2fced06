"""Growth by frames and size: windows cover the clip, one window is the whole, figures hang together."""

import pytest
import torch

from mive_core.bench.growth import CLEAR_REFS, Point, bench_growth, context_windows, draw_growth, growth_exponent, make_windowed_forward, measure_point
from mive_core.bench.models import random_dit, workload
from mive_core.errors import UserError


@pytest.mark.parametrize(
    "num_frames, spans",
    [
        (5, [(0, 5)]),
        (9, [(0, 9)]),
        (10, [(0, 9), (1, 10)]),
        (15, [(0, 9), (6, 15)]),
        (21, [(0, 9), (6, 15), (12, 21)]),
        (22, [(0, 9), (6, 15), (12, 21), (13, 22)]),
    ],
)
def test_windows_cover_the_clip(num_frames, spans):
    assert context_windows(num_frames, 9, 3) == spans


def test_where_windows_overlap_the_result_is_their_mean():
    work = workload("tiny", size=(32, 32), num_frames=17, blocks=1)
    model = random_dit(work)
    torch.manual_seed(0)
    count, joined = make_windowed_forward(model, work, Point("tiny", (32, 32), 17, 1, 3, 1, 1))
    with torch.inference_mode():
        result = joined()
    assert count == 2 and result.shape == (1, 16, 5, 4, 4) and result.isfinite().all() and result.std() > 0.01
    torch.manual_seed(0)
    count, whole = make_windowed_forward(model, work, Point("tiny", (32, 32), 17, 1, 5, 1, 1))
    torch.manual_seed(0)
    _, plain = make_windowed_forward(model, work, Point("tiny", (32, 32), 17, 1, None, 0, 1))
    with torch.inference_mode():
        assert count == 1 and whole().shape == plain().shape


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="NO /proc: peak memory cannot be told here")
def test_a_process_that_did_not_grow_tells_nothing(monkeypatch):
    monkeypatch.setattr("mive_core.bench.growth.resident", lambda name: 1 << 20)
    row = measure_point(Point("tiny", (32, 32), 5, 1, None, 0, 1))
    assert row["rss_bytes"] == 0 and row["rss_error"] is None and row["counted_bytes"] > 0


def test_exponents():
    assert growth_exponent([{"frames": n, "processor_seconds": 3 * n**2} for n in (1, 2, 4, 8)]) == pytest.approx(2)
    assert growth_exponent([{"frames": n, "processor_seconds": 0.1 * n} for n in (1, 2, 4, 8)]) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="NO /proc: peak memory cannot be told here")
def test_the_report_and_its_picture():
    report = bench_growth("tiny", size=(64, 64), frames=(5, 17, 33), sizes=((64, 64),), blocks=1, window_frames=9, overlap_frames=5)
    assert [row["windows"] for row in report["by_frames_in_windows"]] == [1, 3, 7]
    assert [row["windows"] for row in report["by_frames"]] == [1, 1, 1] and report["by_size"][0]["frames"] == 9
    for row in report["by_frames"] + report["by_size"]:
        assert row["seconds"] > 0 and row["processor_seconds"] > 0 and abs(row["counted_error"]) < 0.2
        assert (row["rss_error"] is None) == (row["rss_bytes"] == 0)
    assert report["by_frames_in_windows"][2]["counted_bytes"] < report["by_frames"][2]["counted_bytes"]
    picture = draw_growth(report)
    assert picture.size == (920, 380) and len(picture.getcolors(100_000)) > 20


@pytest.mark.parametrize(
    "changed, said", [(dict(frames=(16,)), "got frames 16"), (dict(overlap_frames=33), "windows of 33 with 33 shared"), (dict(preset="huge"), "got huge")]
)
def test_points_that_do_not_fit(changed, said):
    with pytest.raises(UserError, match=said):
        bench_growth(**changed)
