"""The budget of a training against one whose tensors are counted, and the presets against the cards that they name."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mive_core.attention import torch_attention
from mive_core.bench.memory_counter import MemoryCounter
from mive_core.config import PRESETS
from mive_core.cost.flops import Layout
from mive_core.dit import MiVEDiT
from mive_core.errors import UserError
from mive_core.train import blocks
from mive_core.train.budget import CARDS, RESERVED, block_size, clip_layout, lora_size, new_parts_size, scaling_report, training_memory
from mive_core.train.edit_task import EditRecipe
from mive_core.train.lora import TARGETS, add_lora
from mive_core.train.objective import EditFeatures, flow_matching_losses

CONFIG = replace(PRESETS["tiny"], num_blocks=3, width=192, num_heads=3, ffn_width=768, patch_size=(1, 2, 2))
LAYOUT = Layout(40, (5, 12, 12))


def recipe(**changes) -> EditRecipe:
    return EditRecipe(
        **{"task": "edit", "output_dir": "", "export": "", "num_steps": 1, "start_from": "", "caches": ("c",), "gradient_checkpointing": True, **changes}
    )


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"bf16": True, "weight_dtype": "bf16", "lora_rank": 4}, {}, {"lora_rank": 4}],
    ids=["full_bf16", "lora_bf16", "full_fp32", "lora_fp32"],
)
def test_a_step_holds_what_the_budget_says(changes):
    own = recipe(**changes)
    model = MiVEDiT(CONFIG, operations=nn, attention=torch_attention, dtype=torch.bfloat16 if own.weight_dtype == "bf16" else torch.float32)
    if own.lora_rank:
        add_lora(model, own.lora_rank, TARGETS, own.alpha)
    blocks.checkpoint_activations(model)
    draw = lambda *shape: torch.randn(1, *shape)
    (frames, rows, columns), states = LAYOUT.grid, draw(2, LAYOUT.num_condition, CONFIG.vlm_width)
    target, source, noise = (draw(16, frames, 2 * rows, 2 * columns) for _ in range(3))
    batch = EditFeatures(target, source, target[:, :, :1], states, torch.ones(1, frames, 2 * rows, 2 * columns))
    with MemoryCounter() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=own.bf16, cache_enabled=False):
            loss = flow_matching_losses(model, batch, states, noise, torch.tensor([0.5]), 1.0)["loss"]
        loss.backward()
    budget = training_memory(own, CONFIG, LAYOUT.num_tokens)
    assert budget.activations + budget.gradients == pytest.approx(counted.peak, rel=0.12)


def test_sizes_are_those_of_the_models():
    model = MiVEDiT(CONFIG, operations=nn, attention=torch_attention)
    assert block_size(CONFIG) == sum(p.numel() for p in model.blocks[0].parameters())
    assert lora_size(CONFIG, 4) == sum(p.numel() for p in add_lora(model, 4, TARGETS, 4).values())


def test_where_the_bytes_lie():
    plain, many = training_memory(recipe(bf16=True), CONFIG, 1000), training_memory(recipe(bf16=True, sharded=True, ema_decay=0.9), CONFIG, 1000, 4)
    assert plain.optimizer == 2 * plain.weights and plain.averages == plain.in_flight == 0
    assert many.weights == plain.weights // 4 and many.averages == many.weights and many.in_flight > 0
    assert training_memory(recipe(bf16=True, offload=True), CONFIG, 1000).activations == plain.activations - 3 * 1000 * CONFIG.width * 2
    assert training_memory(recipe(bf16=True, optimizer="adamw_8bit"), CONFIG, 1000).optimizer == plain.optimizer // 4
    kept = training_memory(recipe(bf16=True, weight_dtype="bf16", float8="kept", lora_rank=4), CONFIG, 1000)
    assert kept.weights < 0.4 * plain.weights and kept.optimizer < 0.05 * plain.optimizer
    fresh = training_memory(recipe(bf16=True, weight_dtype="bf16", float8="kept", lora_rank=4), CONFIG, 1000, untrained=True)
    assert fresh.gradients - kept.gradients == 4 * new_parts_size(CONFIG) and fresh.weights - kept.weights == 2 * new_parts_size(CONFIG)  # from 16 bits to 32
    with pytest.raises(UserError, match="counted where blocks are recomputed"):
        training_memory(recipe(gradient_checkpointing=False), CONFIG, 1000)


@pytest.mark.slow
def test_scale_says_what_fits_and_where_a_sequence_has_to_be_spread():
    report = scaling_report()
    rows = {(row["size"][1], row["cards"], row["offload"]): row for row in report["rows"]}
    assert len(rows) == 12 and not rows[720, 8, False]["fits"] and rows[720, 8, True]["fits"] and rows[480, 8, False]["fits"]
    for (height, _cards, _), row in rows.items():
        assert row["fits"] == (row["longest_sequence"] >= row["tokens"]) == (row["frames_of_it"] >= 81)
        assert row["seconds_a_step"] == max(row["seconds"].values()) and row["mfu"] < report["assumed_share_of_peak"]
        assert row["tokens"] == clip_layout((1280, 720) if height == 720 else (832, 480), 81).num_tokens
    assert 0.27e17 < rows[720, 8, True]["flops_counted"] + rows[720, 8, True]["flops_recomputed"] < 0.31e17
    with pytest.raises(UserError, match="unknown card; got TPU"):
        scaling_report(card="TPU")


@pytest.mark.parametrize(
    "name, preset, size, frames, card, processes",
    [
        ("paper_14b_8xh100", "14b", (1280, 720), 81, "H100", 8),
        ("lora_14b_1x24gb", "14b", (832, 480), 81, "RTX 3090", 1),
        ("full_1p3b_1x80gb", "1.3b", (832, 480), 81, "A100", 1),
        ("lora_1p3b_1x24gb", "1.3b", (832, 480), 81, "RTX 3090", 1),
        ("lora_1p3b_1x16gb", "1.3b", (832, 480), 33, "RTX 4080", 1),
    ],
)
def test_a_preset_fits_the_card_that_it_names(recipes, name, preset, size, frames, card, processes):
    """Fresh from Wan, so that a LoRA's recipe trains the new parts too."""
    memory = training_memory(recipes[name], PRESETS[preset], clip_layout(size, frames).num_tokens, processes, untrained=True)
    assert memory.total + RESERVED <= CARDS[card]
