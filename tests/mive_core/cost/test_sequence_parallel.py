"""The memory and traffic of shared forwards against forwards of one rank whose tensors and messages are counted, at the real shapes, on no device."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as distributed

from mive_core.attention import torch_attention
from mive_core.bench.against_diffusers import make_forward
from mive_core.bench.memory_counter import MemoryCounter
from mive_core.config import PRESETS
from mive_core.cost.flops import Layout
from mive_core.cost.sequence_parallel import exchanged_bytes, shared_activation_bytes
from mive_core.dit import MiVEDiT
from mive_core.sequence_parallel import Forward, Ranks, SharedBlocks


@pytest.mark.parametrize(
    "preset, layout, dtype, num_ranks",
    [
        ("14b", Layout(4600, (21, 45, 80)), torch.bfloat16, 2),
        ("14b", Layout(4600, (21, 45, 80)), torch.bfloat16, 4),
        ("14b", Layout(4600, (21, 45, 80)), torch.bfloat16, 8),
        ("14b", Layout(1500, (21, 30, 52)), torch.bfloat16, 8),
        ("1.3b", Layout(4600, (21, 45, 80)), torch.bfloat16, 4),
        ("tiny", Layout(40, (5, 16, 16)), torch.float32, 2),
    ],
)
def test_formulas_equal_what_a_rank_holds_and_sends(preset, layout, dtype, num_ranks, monkeypatch):
    """Messages come from nowhere: their sizes are those of the real ones."""
    sent = []

    def all_to_all_single(result, rows, received_counts, sent_counts, group):
        assert (len(result), len(rows)) == (sum(received_counts), sum(sent_counts))
        away = len(rows) - sent_counts[rank]
        sent.append(rows[:1].nbytes * away if away else 0)

    monkeypatch.setattr(distributed, "all_to_all_single", all_to_all_single)
    for name in ("broadcast", "broadcast_object_list"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)
    config = replace(PRESETS[preset], num_blocks=2)
    num_tokens, per_frame = layout.num_tokens, layout.grid[1] * layout.grid[2]
    expected = shared_activation_bytes(config, num_tokens, num_ranks, dtype.itemsize)
    for rank, memory in ((0, expected[0]), (num_ranks - 1, expected[1])):
        sent.clear()
        with torch.device("meta"), torch.inference_mode():
            dit = MiVEDiT(config, operations=torch.nn, attention=torch_attention, dtype=dtype)
            shared = SharedBlocks(dit, Ranks(rank, num_ranks, torch.device("meta")))
            call = make_forward(dit, layout)
            with MemoryCounter() as counted:
                call() if not rank else shared.take_part(Forward(1, num_tokens, layout.num_condition + per_frame, 1, dtype))
        assert memory == pytest.approx(counted.peak, rel=0.1)
        if not rank:
            assert exchanged_bytes(config, num_tokens, num_ranks, dtype.itemsize) == pytest.approx(sum(sent), rel=0.05)
