"""Training on cached pairs: batches, LoRA, recomputation, resume, and what is refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mive_core.attention import torch_attention
from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit
from mive_core.formats.quantize import quantize
from mive_core.pipeline import check_compiler
from mive_core.train.cache import CacheSettings, Encoders, cache
from mive_core.train.edit_task import CachedBatches, EditRecipe, EditTask
from mive_core.train.flow_matching import draw_times
from mive_core.train.loop import run
from mive_core.train.recipe import parse_recipe
from mive_core.train.tasks import train


@pytest.fixture(scope="module")
def cached(random_models, tmp_path_factory):
    """Five pairs of 48x32 and two of 32x32 in a folder each."""
    folder, encoders = tmp_path_factory.mktemp("caches"), Encoders.load(random_models)
    for name, size, num in (("wide", (48, 32), 5), ("square", (32, 32), 2)):
        manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", size, 5), num), folder / f"{name}_pairs")
        cache(read_manifest(manifest), encoders, folder / name, CacheSettings(negative=name == "wide"))
    return folder


def recipe(cached, random_models, folder, **changes) -> EditRecipe:
    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(cached / "wide")],
        "output_dir": str(folder / "run"),
        "export": str(folder / "out.safetensors"),
        "num_steps": 4,
        "num_warmup_steps": 1,
        "num_workers": 0,
        "learning_rate": "1e-2",
        "checkpoint_every_s": 0.0,
        "log_every": 1,
    }
    return parse_recipe(EditRecipe, values | changes)


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_an_epoch_visits_every_pair_in_batches_of_one_shape(cached):
    batches = CachedBatches((str(cached / "wide"), str(cached / "square")), 2, seed=1)
    orders = [batches.order(epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1] and orders[0] == CachedBatches((str(cached / "wide"), str(cached / "square")), 2, seed=1).order(0)
    for order in orders:
        assert {(folder, entry.key) for batch in order for folder, entry in batch} == {
            (folder, entry.key) for group in batches.shapes.values() for folder, entry in group
        }
        assert all(len({(entry.grid, entry.num_tokens) for _, entry in batch}) == 1 and len(batch) == 2 for batch in order)
    features, again = batches[0], batches[0]
    assert torch.equal(features.target, again.target) and features.states.dtype == torch.float32
    widths = {batches[i].target.shape[-1]: batches[i].negative is not None for i in range(batches.num_batches)}
    assert widths == {6: True, 4: False}  # the squares were cached without the negative
    assert {grid[-1]: num_negative > 0 for grid, _, num_negative, _ in batches.shapes} == widths  # pairs with negatives of other lengths do not meet


@pytest.mark.parametrize("alpha", [0.0, 6.0])
def test_a_lora_in_peft_format_is_what_was_trained(cached, random_models, tmp_path, alpha):
    """The product of its matrices is the whole change: alpha is in them."""
    task = EditTask(recipe(cached, random_models, tmp_path, lora_rank=3, lora_alpha=alpha, ema_decay=0.9))
    base = {name: value.clone() for name, value in load_dit(random_models, attention=torch_attention).state_dict().items()}
    run(task)
    weights = load_file(tmp_path / "out.safetensors")
    assert len(weights) == 2 * 6 * task.config.num_blocks
    for name in base:
        key = f"diffusion_model.{name.removesuffix('.weight')}.lora_"
        if key + "A.weight" in weights:
            a, b = weights.pop(key + "A.weight"), weights.pop(key + "B.weight")
            assert a.shape[0] == b.shape[1] == 3 and b.abs().max() > 0
            base[name] += b @ a
    assert not weights
    merged = load_dit(random_models, attention=torch_attention)
    merged.load_state_dict(base)
    batch, t = task.dataset[0], torch.tensor([0.4])
    with torch.no_grad():
        trained, loaded = (m(batch.target, batch.source, batch.reference, m.embed_condition(batch.states), t) for m in (task.model, merged))
    torch.testing.assert_close(trained, loaded, atol=1e-5, rtol=1e-5)


def test_all_weights_are_trained_and_exported_whole(cached, random_models, tmp_path):
    run(EditTask(recipe(cached, random_models, tmp_path)))
    before, after = load_dit(random_models, attention=torch_attention), load_dit(tmp_path / "out.safetensors", attention=torch_attention)
    assert after.config == before.config
    assert all(not torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=["full", "lora"])
def test_recomputed_and_offloaded_activations_change_no_bit(cached, random_models, tmp_path, changes):
    for name, how in (("plain", {}), ("recomputed", {"gradient_checkpointing": True}), ("offloaded", {"gradient_checkpointing": True, "offload": True})):
        run(EditTask(recipe(cached, random_models, tmp_path / name, batch_size=2, **changes, **how)))
    plain = load_file(tmp_path / "plain" / "out.safetensors")
    for name in ("recomputed", "offloaded"):
        other = load_file(tmp_path / name / "out.safetensors")
        assert losses(tmp_path / "plain") == losses(tmp_path / name)
        assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(cached, random_models, tmp_path):
    try:
        check_compiler("cpu")
    except UserError as error:
        pytest.skip(str(error))
    for name, compiled in (("eager", False), ("compiled", True)):
        run(EditTask(recipe(cached, random_models, tmp_path / name, compiled=compiled, gradient_checkpointing=True, learning_rate=1e-3)))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)


def test_a_lora_over_weights_that_stay_in_8_bits(cached, random_models, tmp_path):
    quantize(random_models / "dit.safetensors", tmp_path / "fp8.safetensors", "fp8_scaled")
    changes = {"start_from": str(tmp_path / "fp8.safetensors"), "lora_rank": 3}
    for name, float8 in (("back", "scaled_back"), ("kept", "kept")):
        run(EditTask(recipe(cached, random_models, tmp_path / name, float8=float8, gradient_checkpointing=float8 == "kept", **changes)))
    task = EditTask(recipe(cached, random_models, tmp_path / "kept", float8="kept", **changes))
    inside = task.model.blocks[0].self_attn.q
    assert inside.base_layer.weight.dtype == torch.float8_e4m3fn and {p.dtype for p in task.modules["lora"].parameters()} == {torch.float32}
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "back"), rel=0.05)  # drawn anew: a LoRA's start differs
    assert len(load_file(tmp_path / "kept" / "out.safetensors")) == 12


def test_averages_in_8_bits_resume_bit_for_bit(cached, random_models, tmp_path):
    pytest.importorskip("torchao", reason="TORCHAO IS NOT INSTALLED")
    changes = {"optimizer": "adamw_8bit", "learning_rate": 1e-3}
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step for each shape, which takes minutes
        run(EditTask(recipe(cached, random_models, tmp_path / "whole", **changes)))
        run(EditTask(recipe(cached, random_models, tmp_path / "halves", **changes)), stop_at=2)
        run(EditTask(recipe(cached, random_models, tmp_path / "halves", **changes)))
    run(EditTask(recipe(cached, random_models, tmp_path / "32", learning_rate=1e-3)))
    whole, halves, precise = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "halves", "32"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    stored = load_file(max((tmp_path / "whole" / "run").glob("step_*")))
    assert sum(key.endswith(":codes") for key in stored) > 20 and {v.dtype for k, v in stored.items() if k.endswith(":codes")} == {torch.uint8}
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "32"), rel=0.02)
    assert not torch.equal(whole["head.head.weight"], precise["head.head.weight"])


@pytest.mark.parametrize("changes", [{"lora_rank": 2, "ema_decay": 0.5}, {"gradient_accumulation_steps": 2, "condition_dropout": 0.5}])
def test_resume_equals_uninterrupted(cached, random_models, tmp_path, changes):
    run(EditTask(recipe(cached, random_models, tmp_path / "whole", **changes)))
    run(EditTask(recipe(cached, random_models, tmp_path / "halves", **changes)), stop_at=2)
    run(EditTask(recipe(cached, random_models, tmp_path / "halves", **changes)))
    whole, halves = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)


@pytest.mark.filterwarnings("ignore:.*goes on from step")
def test_a_finished_run_goes_on_to_more_steps(cached, random_models, tmp_path):
    run(EditTask(recipe(cached, random_models, tmp_path / "whole", lora_rank=2, num_steps=4)))
    run(EditTask(recipe(cached, random_models, tmp_path / "more", lora_rank=2, num_steps=2)))
    run(EditTask(recipe(cached, random_models, tmp_path / "more", lora_rank=2, num_steps=4)))
    whole, more = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "more"))
    assert all(torch.equal(whole[key], more[key]) for key in whole) and len(losses(tmp_path / "more")) == 4


def recorded(folder) -> list[dict]:
    with safe_open(str(max((folder / "run").glob("step_*"))), framework="pt") as file:
        return json.loads(file.metadata()["mive.training"])["changes"]


def test_a_run_goes_on_with_another_learning_rate_and_says_so(cached, random_models, tmp_path):
    """From the same checkpoint: the next step is in proportion to the rate, and Adam's averages are those of before."""
    steps = []
    for name, changes in (("same", {}), ("half", {"learning_rate": 5e-3, "weight_decay": 0.1, "num_warmup_steps": 2})):
        run(EditTask(recipe(cached, random_models, tmp_path / name, lora_rank=2, weight_decay=0.0)), stop_at=3)
        before = load_file(tmp_path / name / "run" / "step_00000002.safetensors")
        own = recipe(cached, random_models, tmp_path / name, lora_rank=2, **{"weight_decay": 0.0, **changes})
        if changes:
            with pytest.warns(UserWarning, match="goes on from step 4 with a change of learning_rate from 0.01 to 0.005, num_warmup_steps from 1 to 2, weight"):
                run(EditTask(own))
        else:
            run(EditTask(own))
        after = load_file(tmp_path / name / "run" / "step_00000003.safetensors")
        key = next(key for key in before if key.startswith("module.lora.") and ".lora_B" in key.replace("/", "."))
        steps.append(after[key] - before[key] * (1 - 5e-3 * 0.1 if changes else 1))
    torch.testing.assert_close(2 * steps[1], steps[0], rtol=1e-3, atol=1e-6)
    assert recorded(tmp_path / "same") == []
    assert recorded(tmp_path / "half") == [{"step": 3, "changed": {"learning_rate": [0.01, 0.005], "num_warmup_steps": [1, 2], "weight_decay": [0.0, 0.1]}}]
    with pytest.warns(UserWarning, match="learning_rate from 0.005 to 0.01, num_steps from 4 to 5"):
        run(EditTask(recipe(cached, random_models, tmp_path / "half", lora_rank=2, num_steps=5, weight_decay=0.1, num_warmup_steps=2)))
    assert [change["step"] for change in recorded(tmp_path / "half")] == [3, 4]


@pytest.mark.parametrize("changes", [{"muon_learning_rate": 0.1}, {"time_learning_rate": 1e-3}, {"lora_rank": 2}, {"seed": 1}, {"betas": [0.8, 0.9]}])
def test_what_would_make_another_run_of_it_does_not_change(cached, random_models, tmp_path, changes):
    """Muon and the time layers have parameter groups of their own, so that a checkpoint without them cannot be gone on from with them."""
    run(EditTask(recipe(cached, random_models, tmp_path)), stop_at=1)
    with pytest.raises(UserError, match=f"written by another recipe.*different {next(iter(changes))}"):
        run(EditTask(recipe(cached, random_models, tmp_path, **changes)))


@pytest.mark.filterwarnings("ignore:.*goes on from step")
def test_where_the_rate_decays_the_decay_follows_the_new_end(cached, random_models, tmp_path):
    run(EditTask(recipe(cached, random_models, tmp_path, lora_rank=2, num_steps=2, decay_ratio=0.5)))
    task = EditTask(recipe(cached, random_models, tmp_path, lora_rank=2, num_steps=8, decay_ratio=0.5))
    run(task)
    assert [task.lr_factor(step) for step in range(2, 8)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25] and len(losses(tmp_path)) == 8
    assert recorded(tmp_path) == [{"step": 2, "changed": {"num_steps": [2, 8]}}]


def test_fewer_steps_than_there_are_is_an_error_and_as_many_export_again(cached, random_models, tmp_path):
    run(EditTask(recipe(cached, random_models, tmp_path, lora_rank=2)))
    exported, log = load_file(tmp_path / "out.safetensors"), (tmp_path / "run" / "log.jsonl").read_bytes()
    (tmp_path / "out.safetensors").unlink()
    with pytest.raises(UserError, match="has more steps than num_steps; got 4; expected at most 3; set num_steps to 4 to export it, or to more to go on"):
        run(EditTask(recipe(cached, random_models, tmp_path, lora_rank=2, num_steps=3)))
    assert not (tmp_path / "out.safetensors").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(EditTask(recipe(cached, random_models, tmp_path, lora_rank=2)))
    again = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(again[key], exported[key]) for key in exported) and (tmp_path / "run" / "log.jsonl").read_bytes() == log


def test_one_name_is_a_list_of_one(cached, random_models, tmp_path):
    """A cache once was read letter by letter."""
    own = recipe(cached, random_models, tmp_path, caches=str(cached / "wide"), lora_targets="ffn.0")
    assert own.caches == (str(cached / "wide"),) and own.lora_targets == ("ffn.0",)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"betas": "0.9"}, "the recipe's betas is no list; got '0.9'"),
        ({"caches": None}, "the recipe's caches is no list of names; got None"),
        ({"caches": [1]}, "the recipe's caches is no list of names"),
        ({"num_steps": 0}, "num_steps: a run takes a step or more; got 0"),
        ({"num_steps": -3}, "num_steps: a run takes a step or more; got -3"),
    ],
)
def test_values_that_are_no_lists_or_no_steps_are_refused(cached, random_models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        recipe(cached, random_models, tmp_path, **changes)


def test_no_warmup_is_none(cached, random_models, tmp_path):
    assert EditTask(recipe(cached, random_models, tmp_path, lora_rank=1, num_warmup_steps=0)).lr_factor(0) == 1.0


@pytest.mark.slow
def test_a_lora_learns_a_pair_by_heart(cached, random_models, tmp_path):
    task = EditTask(recipe(cached, random_models, tmp_path, lora_rank=8, num_steps=60, batch_size=4))
    task.dataset.order = lambda epoch: [[(str(cached / "wide"), next(e for _, e in next(iter(task.dataset.shapes.values()))))] * 4] * 99
    run(task)
    series = losses(tmp_path)
    assert sum(series[-10:]) < 0.85 * sum(series[:10])  # 0.77 measured


def test_dropout_reads_the_empty_instruction(cached, random_models, tmp_path):
    task = EditTask(recipe(cached, random_models, tmp_path, condition_dropout=1.0))
    features = task.dataset[0]
    draw = lambda: torch.Generator().manual_seed(3)
    dropped = task.loss(0, features, draw())["loss"]
    kept = EditTask(replace(task.recipe, condition_dropout=0.0))
    assert torch.equal(dropped, kept.loss(0, replace(features, states=features.negative), draw())["loss"])
    assert not torch.equal(dropped, kept.loss(0, features, draw())["loss"])


def test_times_are_spread_as_asked():
    uniform, middle = (draw_times(4000, name, torch.Generator().manual_seed(0)) for name in ("uniform", "logit_normal"))
    inside = lambda t: ((t > 0.25) & (t < 0.75)).float().mean()
    assert abs(inside(uniform) - 0.5) < 0.03 and abs(inside(middle) - 0.728) < 0.03  # P(|normal| < ln 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"time_sampling": "beta"}, "time_sampling is unknown; got 'beta'; expected uniform or logit_normal"),
        ({"lora_targets": ["cross_attn.q"]}, "LoRA cannot sit there; got cross_attn.q"),
        ({"caches": []}, "names no cache"),
        ({"optimizer": "sgd"}, "optimizer is unknown; got 'sgd'; expected adamw or adamw_8bit"),
        ({"float8": "kept"}, "weights in 8 bits are not trained"),
        ({"weight_dtype": "bf16"}, "set bf16 to true"),
        ({"offload": True}, "offload moves what gradient_checkpointing keeps"),
        ({"muon_learning_rate": 0.1, "lora_rank": 1}, "Muon moves whole matrices"),
        ({"time_learning_rate": 1e-4, "lora_rank": 1}, "a LoRA leaves the time layers"),
        ({"sharded": True, "lora_rank": 1}, "a LoRA is not sharded"),
        pytest.param({"device": "cuda"}, "there is no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="A CUDA DEVICE IS THERE")),
        ({"caches": ["nowhere"]}, "no cache of features"),
        ({"condition_dropout": 0.1, "caches": ["SQUARE"]}, "condition_dropout needs"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(cached, random_models, tmp_path, changes, message):
    changes = {key: [str(cached / "square") if v == "SQUARE" else v for v in value] if isinstance(value, list) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        EditTask(recipe(cached, random_models, tmp_path, **changes))


def test_a_cache_for_other_layers_or_a_damaged_one_is_refused(cached, random_models, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in (cached / "wide").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    own = recipe(cached, random_models, tmp_path, caches=[str(folder)])
    (shard,) = folder.glob("*.safetensors")
    task = EditTask(own)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match="shard of the cache cannot be read"):
        task.dataset[0]
    index = json.loads((folder / "index.json").read_text())
    index["contract"]["layers"] = [1, 3]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"made for other layers; got \[1, 3\]; expected \[1, 4\]"):
        EditTask(own)


def test_a_recipe_file_trains(cached, random_models, tmp_path):
    import yaml

    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(cached / "square")],
        "num_steps": 1,
        "lora_rank": 1,
        "output_dir": str(tmp_path / "run"),
        "export": str(tmp_path / "lora.safetensors"),
        "num_workers": 0,
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    train(tmp_path / "r.yaml")
    assert len(load_file(tmp_path / "lora.safetensors")) == 12
