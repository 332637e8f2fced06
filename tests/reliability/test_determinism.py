"""The same seed gives the same bits on the same number of threads, and nearly the same on another."""

import sys
from pathlib import Path

import pytest
import torch

from mive_core.pipeline import Pipeline

sys.path.append(str(Path(__file__).parent))
from determinism import differ, edit_stages


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits():
    """results/reliability/determinism.json has other processes too, and a training."""
    pipeline, found, before = Pipeline.load("tiny"), {}, torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found[threads] = edit_stages(pipeline, num_frames=5)
            assert not any(differ(found[threads], edit_stages(pipeline, num_frames=5)).values()), threads
    finally:
        torch.set_num_threads(before)
    for stage, value in differ(found[1], found[2]).items():
        assert value < 1e-5 * float(found[1][stage].abs().max()), stage
