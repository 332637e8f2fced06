"""The tests see mive_core as installed; the repository's root, a ComfyUI pack, stays off sys.path."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from mive_core.cli import quiet_libraries
from mive_core.formats.vlm_file import VIDEO_TOKEN, config_from_shapes

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path.append(str(Path(__file__).parent / "shared"))  # not tests/ itself, whose folder mive_core would stand for the package

quiet_libraries()  # as the command line does, before any test imports them


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small tensors: one thread is as fast as two, and steadier."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def peak_memory():
    """Code for another process that defines `peak()`, its peak resident bytes. ru_maxrss would begin with the peak of the process that started it."""
    if sys.platform != "linux":
        pytest.skip("memory is read as Linux counts it")
    return "import re; peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"


@pytest.fixture(scope="session")
def body():
    """A random Qwen3-VL, two text layers deep and 64 wide, in all else as published: heads of 128, 24 vision layers, the vocabulary."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(0)
    shapes = {
        "language_model.embed_tokens.weight": (VIDEO_TOKEN + 1, 64),
        "language_model.layers.0.self_attn.q_norm.weight": (128,),
        "language_model.layers.1.self_attn.q_norm.weight": (128,),
        "language_model.layers.0.mlp.gate_proj.weight": (96, 64),
        "language_model.layers.0.self_attn.q_proj.weight": (256, 64),
        "language_model.layers.0.self_attn.k_proj.weight": (128, 64),
        "visual.patch_embed.proj.weight": (64, 3, 2, 16, 16),
        "visual.blocks.23.norm1.weight": (64,),
        "visual.blocks.0.mlp.linear_fc1.weight": (96, 64),
        "visual.pos_embed.weight": (36, 64),
    }
    return Qwen3VLModel(Qwen3VLConfig(**config_from_shapes(Path(), shapes))).eval()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """One line at the end: how many tests did not run, and why."""
    result = yield
    skipped = terminalreporter.stats.get("skipped", [])
    deselected = len(terminalreporter.stats.get("deselected", []))
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    parts = [f"{number} ({reason})" for reason, number in reasons.most_common()]
    parts += [f"{deselected} (left out by the options)"] * bool(deselected)
    total = len(skipped) + deselected
    terminalreporter.write_line(f"{total} test{'s' * (total > 1)} did not run: {'; '.join(parts)}" if total else "every test ran")
    return result
