"""Loading, measured in a process of its own: the figures hang together, and nothing is left behind."""

import pytest

from mive_core.bench.load import STATUS, bench_load, resident
from mive_core.errors import UserError

needs_linux = pytest.mark.skipif(not STATUS.exists(), reason="NO /proc: peak memory cannot be told here")


@pytest.mark.slow
@needs_linux
def test_a_sharded_dit_is_measured_and_removed(tmp_path):
    figures = bench_load("1.3b", blocks=2, shards=3, folder=tmp_path)
    assert figures["file_bytes"] == figures["model_bytes"] > 190e6
    assert figures["rss_before"] < figures["peak_rss"] and figures["rss_before"] + 0.9 * figures["file_bytes"] < figures["peak_rss"]
    assert figures["peak_rss"] - figures["rss_before"] < figures["file_bytes"] + 200e6  # a second copy would be as much again; the rest is libraries
    assert not list(tmp_path.iterdir())


@needs_linux
def test_memory_now_is_at_most_memory_at_most():
    assert 10e6 < resident("VmRSS") <= resident("VmHWM")


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown model; got huge"):
        bench_load("huge", folder=tmp_path)
