"""Growth of an edit with the clip's length: what grows is the source at the edit's size, not the clip."""

import pytest

from mive_core.bench.growth import CLEAR_REFS
from mive_core.bench.length import bench_length
from mive_core.cli import main
from mive_core.errors import UserError


@pytest.mark.slow
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="NO /proc: peak memory cannot be told here")
def test_memory_does_not_grow_with_the_clips_own_size():
    report = bench_length((640, 360), (48, 32), (17, 97), steps=1)
    short, long = report["lengths"]
    assert (short["frames"], long["frames"]) == (17, 97) and long["seconds"] > short["seconds"]
    assert long["peak_bytes"] > 640 * 360 * 3  # something was measured
    assert report["bytes_per_frame"] < 0.3 * report["clip_bytes_per_frame"]


@pytest.mark.parametrize("frames, message", [((16, 33), "the length does not fit"), ((33, 33), "growth needs two lengths")])
def test_lengths_that_do_not_fit(frames, message):
    with pytest.raises(UserError, match=message):
        bench_length(frames=frames)


def test_the_command_refuses_a_length(capsys):
    assert main(["bench", "length", "--frames", "16", "--frames", "33"]) == 2
    assert "4n+1" in capsys.readouterr().err
