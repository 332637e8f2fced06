"""A LoRA on a checkpoint fresh from Wan: what Wan lacks is trained whole beside it, and one file holds both."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from mive_core.attention import torch_attention
from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.dit import MiVEDiT
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit, read_config, save_dit
from mive_core.formats.lora_file import read_lora
from mive_core.formats.merge import merge
from mive_core.formats.quantize import quantize
from mive_core.formats.untrained import NEW_PARTS, untrained_metadata, untrained_parts
from mive_core.train.budget import new_parts_size
from mive_core.train.cache import Encoders, cache
from mive_core.train.checkpoints import RecipeMismatch
from mive_core.train.edit_task import EditRecipe, EditTask
from mive_core.train.loop import run
from mive_core.train.recipe import parse_recipe


@pytest.fixture(scope="module")
def cached(random_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new_parts")
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (48, 32), 5), 3), folder / "pairs")
    cache(read_manifest(manifest), Encoders.load(random_models), folder / "cache")
    return folder / "cache"


@pytest.fixture(scope="module")
def fresh(random_models, tmp_path_factory) -> Path:
    """The random DiT as it would come from Wan: its patch embedding ignores the source, and it says so. In bf16."""
    path, source = tmp_path_factory.mktemp("fresh") / "dit.safetensors", random_models / "dit.safetensors"
    state, config = load_file(source), read_config(source)
    state["patch_embedding.weight"][:, config.latent_channels :] = 0
    save_dit(path, state, config, torch.bfloat16, untrained_metadata())
    return path


def recipe(cached, start: Path, folder: Path, **changes) -> EditRecipe:
    values = {
        "task": "edit",
        "start_from": str(start),
        "caches": [str(cached)],
        "output_dir": str(folder / "run"),
        "export": str(folder / "lora.safetensors"),
        "num_steps": 1,
        "num_warmup_steps": 1,
        "num_workers": 0,
        "learning_rate": 1e-2,
        "checkpoint_every_s": 0.0,
        "log_every": 1,
        "lora_rank": 2,
    }
    return parse_recipe(EditRecipe, values | changes)


def patched(start: Path, lora: Path) -> MiVEDiT:
    """The base in float32 with all that the file adds."""
    model, file = load_dit(start, attention=torch_attention), read_lora(lora)
    state = model.state_dict()
    for layer, (down, up) in file.adapters.items():
        state[f"{layer}.weight"] += up @ down
    for name, difference in file.differences.items():
        state[name] += difference
    return model


@torch.no_grad()
def velocity(model: MiVEDiT, batch, source=None) -> torch.Tensor:
    return model(batch.target, batch.source if source is None else source, batch.reference, model.embed_condition(batch.states), torch.tensor([0.4]))


def reaction(model: MiVEDiT, batch) -> float:
    """How far another source moves the output."""
    return float((velocity(model, batch, batch.source.flip(-1)) - velocity(model, batch)).abs().max())


def test_after_one_step_the_source_is_read(cached, fresh, tmp_path):
    task = EditTask(recipe(cached, fresh, tmp_path))
    batch = task.dataset[0]
    assert reaction(task.model, batch) == 0.0
    run(task)
    assert reaction(task.model, batch) > 1e-3
    file = read_lora(tmp_path / "lora.safetensors")
    expected = {name for name in task.model.state_dict() if name.split(".")[0] in NEW_PARTS}
    assert file.differences.keys() == expected and all(difference.any() for difference in file.differences.values())
    assert file.metadata["mive.new_parts"] == "context,patch_embedding" and file.base_config == task.config
    model = patched(fresh, tmp_path / "lora.safetensors")
    assert reaction(model, batch) > 1e-3
    torch.testing.assert_close(velocity(model, batch), velocity(task.model, batch), atol=1e-4, rtol=1e-4)


def test_a_lora_alone_is_refused_with_the_reason(cached, fresh, tmp_path):
    with pytest.raises(UserError, match="a LoRA alone never sees the source.*leave new_parts out"):
        EditTask(recipe(cached, fresh, tmp_path, new_parts="frozen"))


def test_from_a_trained_checkpoint_the_choice_is_the_users(cached, random_models, tmp_path):
    start = random_models / "dit.safetensors"
    before = load_file(start)
    run(EditTask(recipe(cached, start, tmp_path / "frozen")))
    run(EditTask(recipe(cached, start, tmp_path / "trained", new_parts="trained")))
    frozen, trained = (read_lora(tmp_path / name / "lora.safetensors") for name in ("frozen", "trained"))
    assert not frozen.differences and "mive.new_parts" not in frozen.metadata and frozen.base_config == read_config(start)
    assert trained.differences.keys() == {name for name in before if name.split(".")[0] in NEW_PARTS}


def test_new_parts_have_a_rate_of_their_own_and_are_precise_over_bf16(cached, fresh, tmp_path):
    """Steps of 1e-4 are lost in bfloat16 weights of size 1, such as those of the norms."""
    task = EditTask(recipe(cached, fresh, tmp_path, weight_dtype="bf16", bf16=True, new_parts_learning_rate=1e-4, weight_decay=0.0))
    assert {p.dtype for p in task.modules["new_parts"].parameters()} == {torch.float32} and task.model.head.head.weight.dtype == torch.bfloat16
    run(task)
    file = read_lora(tmp_path / "lora.safetensors")
    steps = {name: float(difference.abs().max()) for name, difference in file.differences.items()}
    assert all(step == pytest.approx(1e-4, rel=0.02) for step in steps.values()), steps  # Adam's first step is the rate
    assert all(up.abs().max() == pytest.approx(1e-2, rel=0.02) for _, up in file.adapters.values())


def test_the_difference_is_to_the_weights_as_stored(cached, random_models, tmp_path):
    """Over a base stored in float32 and trained in bfloat16."""
    state, config = load_file(random_models / "dit.safetensors"), read_config(random_models / "dit.safetensors")
    state["patch_embedding.weight"][:, config.latent_channels :] = 0
    save_dit(tmp_path / "fp32.safetensors", state, config)
    task = EditTask(recipe(cached, tmp_path / "fp32.safetensors", tmp_path, weight_dtype="bf16", bf16=True))
    run(task)
    for name, difference in read_lora(tmp_path / "lora.safetensors").differences.items():
        torch.testing.assert_close(state[name] + difference, task.model.state_dict()[name], atol=1e-6, rtol=0)


def test_beside_blocks_kept_in_8_bits(cached, fresh, tmp_path):
    quantize(fresh, tmp_path / "fp8.safetensors")
    assert untrained_parts(tmp_path / "fp8.safetensors") == NEW_PARTS
    task = EditTask(recipe(cached, tmp_path / "fp8.safetensors", tmp_path, float8="kept", weight_dtype="bf16", bf16=True, gradient_checkpointing=True))
    assert task.model.blocks[0].self_attn.q.base_layer.weight.dtype == torch.float8_e4m3fn
    assert {p.dtype for p in task.modules["new_parts"].parameters()} == {torch.float32}
    run(task)
    with torch.autocast("cpu", torch.bfloat16):
        assert reaction(task.model, task.dataset[0]) > 1e-3
    stored = load_file(fresh)
    for name, difference in read_lora(tmp_path / "lora.safetensors").differences.items():
        torch.testing.assert_close(stored[name].float() + difference, task.model.state_dict()[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.5}, {"gradient_checkpointing": True, "offload": True}])
def test_a_run_that_was_cut_off_ends_bit_equal(cached, fresh, tmp_path, changes):
    changes = {"num_steps": 4, "new_parts_learning_rate": 1e-3, **changes}
    run(EditTask(recipe(cached, fresh, tmp_path / "whole", **changes)))
    run(EditTask(recipe(cached, fresh, tmp_path / "halves", **changes)), stop_at=2)
    run(EditTask(recipe(cached, fresh, tmp_path / "halves", **changes)))
    whole, halves = (load_file(tmp_path / name / "lora.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)


def test_the_average_is_exported(cached, fresh, tmp_path):
    run(EditTask(recipe(cached, fresh, tmp_path, num_steps=3, ema_decay=0.9)))
    stored, base = load_file(max((tmp_path / "run").glob("step_*"))), load_file(fresh)
    for name, difference in read_lora(tmp_path / "lora.safetensors").differences.items():
        average = stored[f"average.new_parts.{name.replace('.', '/')}"]
        torch.testing.assert_close(base[name].float() + difference, average, atol=1e-6, rtol=0)
        assert not torch.equal(average, stored[f"module.new_parts.{name.replace('.', '/')}"])


def test_a_run_does_not_go_on_with_other_parts(cached, random_models, tmp_path):
    start = random_models / "dit.safetensors"
    run(EditTask(recipe(cached, start, tmp_path)))
    with pytest.raises(RecipeMismatch, match="different new_parts"):
        run(EditTask(recipe(cached, start, tmp_path, new_parts="trained")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"new_parts": "both"}, "new_parts is unknown; got 'both'"),
        ({"new_parts": "trained", "lora_rank": 0}, "new_parts says what is trained beside a LoRA; set lora_rank"),
        ({"new_parts": "frozen", "new_parts_learning_rate": 1e-3}, "what is frozen has no learning rate"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(cached, fresh, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        EditTask(recipe(cached, fresh, tmp_path, **changes))


def test_all_weights_from_a_fresh_checkpoint_give_a_trained_one(cached, fresh, tmp_path):
    run(EditTask(recipe(cached, fresh, tmp_path, lora_rank=0)))
    assert untrained_parts(tmp_path / "lora.safetensors") == ()


def test_the_counts_are_those_of_the_model(cached, fresh, tmp_path):
    task = EditTask(recipe(cached, fresh, tmp_path))
    assert new_parts_size(task.config) == sum(p.numel() for p in task.modules["new_parts"].parameters())
    batch = task.dataset[0]
    latents = torch.cat([torch.cat([batch.reference, batch.target], dim=2), torch.cat([batch.reference, batch.source], dim=2)], dim=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.model.patch_embedding(latents)
        task.model.embed_condition(batch.states)
    with_parts = task.workload(batch).flops
    task.new_parts = {}
    assert with_parts - task.workload(batch).flops == counter.get_total_flops()  # a weight gradient costs as much as the forward pass


def test_merged_into_its_start_it_is_the_trained_model(cached, fresh, tmp_path):
    task = EditTask(recipe(cached, fresh, tmp_path))
    run(task)
    report = merge(fresh, [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "merged.safetensors", "fp32")
    assert "of them new parts" in report["loras"][0]["fit"] and untrained_parts(fresh) == NEW_PARTS and untrained_parts(tmp_path / "merged.safetensors") == ()
    merged, batch = load_dit(tmp_path / "merged.safetensors", attention=torch_attention), task.dataset[0]
    torch.testing.assert_close(velocity(merged, batch), velocity(task.model, batch), atol=1e-4, rtol=1e-4)
    assert reaction(merged, batch) > 1e-3
