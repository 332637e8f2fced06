"""The memory model against a forward whose tensors are counted as they come and go, at the real shapes, on no device at all."""

from dataclasses import replace

import pytest
import torch

from mive_core.attention import torch_attention
from mive_core.bench import Layout, forward_of
from mive_core.config import PRESETS
from mive_core.counted import Counted
from mive_core.dit import MiVEDiT
from mive_core.memory import activation_bytes, weight_bytes


def test_the_counter_counts():
    with Counted() as counted:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = b.view(50, 10)
        d = torch.empty(200, dtype=torch.uint8)
    assert (counted.now, counted.peak) == (700, 1500) and len(c) == 50 and len(d) == 200


@pytest.mark.parametrize("preset, layout, dtype", [
    ("14b", Layout(4600, (21, 45, 80)), torch.bfloat16), ("14b", Layout(1500, (21, 30, 52)), torch.bfloat16),
    ("1.3b", Layout(1500, (21, 30, 52)), torch.bfloat16), ("1.3b", Layout(400, (5, 30, 52)), torch.float32),
    ("1.3b", Layout(4600, (61, 45, 80)), torch.bfloat16), ("tiny", Layout(40, (5, 8, 8)), torch.float32),
])
def test_formula_equals_what_a_forward_holds(preset, layout, dtype):
    config = replace(PRESETS[preset], num_blocks=2)
    with torch.device("meta"), torch.inference_mode():
        call = forward_of(MiVEDiT(config, operations=torch.nn, attention=torch_attention, dtype=dtype), layout)
        with Counted() as counted:
            call()
    assert activation_bytes(config, layout.num_tokens, dtype.itemsize) == pytest.approx(counted.peak, rel=0.1)


def test_weights_are_those_of_the_model():
    with torch.device("meta"):
        model = MiVEDiT(PRESETS["1.3b"], operations=torch.nn, attention=torch_attention)
    count = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert weight_bytes(PRESETS["1.3b"], 2) == 2 * count
    assert weight_bytes(PRESETS["1.3b"], 2, 1) == 2 * count - matrices
    assert 9.5e9 < weight_bytes(PRESETS["14b"], 1) < 10.2e9  # the paper's 9.9 B parameters
