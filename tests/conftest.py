"""The tests see mive_core as installed; the repository's root, a ComfyUI pack, stays off sys.path."""

import sys
from pathlib import Path

import pytest
import torch

from mive_core.cli import quiet_libraries

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

quiet_libraries()  # as the command line does, before any test imports them


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors: one thread is as fast as two, and steadier."""
    torch.set_num_threads(1)
