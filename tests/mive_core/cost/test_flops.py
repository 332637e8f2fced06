"""The formulas count what both models really do."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mive_core.bench import against_diffusers
from mive_core.config import PRESETS
from mive_core.cost.flops import block_flops, cross_attention_flops, dit_flops, layout_for, non_block_flops

CONFIG = replace(PRESETS["tiny"], num_blocks=2)


@pytest.mark.parametrize("name", ["ours", "diffusers"])
def test_formula_equals_the_counted_operations(name):
    layout = layout_for(200)
    n = layout.num_tokens
    if name == "ours":
        call = against_diffusers.make_ours(CONFIG, layout)
        formula = dit_flops(CONFIG, layout)
    else:
        call = against_diffusers.make_diffusers(CONFIG, n)
        formula = CONFIG.num_blocks * (block_flops(CONFIG, n) + cross_attention_flops(CONFIG, n)) + non_block_flops(CONFIG, layout, ours=False)
    # the fused attention kernel of the CPU is not among the operations that torch counts, its matrix products are
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.01)


def test_both_models_get_the_same_number_of_tokens():
    for num_tokens in (512, 2048, 8192):
        layout = layout_for(num_tokens)
        assert abs(layout.num_tokens - num_tokens) <= 0.02 * num_tokens
        assert 0 < layout.num_condition < 0.2 * num_tokens
