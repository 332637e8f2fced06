"""Distillation: the teacher is the model without its LoRA, the student learns straight windows, and the LoRA brings its sampling settings."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml

from mive_core.cli import main
from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.flow import schedule
from mive_core.formats.checkpoint import read_config
from mive_core.formats.lora_file import SAMPLING_KEY, read_lora, sampling_of
from mive_core.formats.merge import merge
from mive_core.pipeline import Pipeline
from mive_core.train import distill
from mive_core.train.cache import CacheSettings, Encoders, cache, read_index
from mive_core.train.distill import DistillRecipe, DistillTask, between, without_lora
from mive_core.train.loop import run
from mive_core.train.recipe import parse_recipe


@pytest.fixture(scope="module")
def cached(random_models, tmp_path_factory):
    """Two pairs, with the states of an empty instruction and without."""
    folder, encoders = tmp_path_factory.mktemp("caches"), Encoders.load(random_models)
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 2), folder / "pairs")
    for name in ("with", "without"):
        cache(read_manifest(manifest), encoders, folder / name, CacheSettings(negative=name == "with"))
    return folder


def recipe(cached, random_models, folder, **changes) -> DistillRecipe:
    values = {
        "task": "distill",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(cached / "with")],
        "output_dir": str(folder / "run"),
        "export": str(folder / "few.safetensors"),
        "num_steps": 3,
        "lora_rank": 2,
        "student_steps": 2,
        "teacher_steps": 3,
        "teacher_cfg": 3.0,
        "num_warmup_steps": 1,
        "num_workers": 0,
        "learning_rate": "1e-2",
        "log_every": 1,
    }
    return parse_recipe(DistillRecipe, values | changes)


@pytest.fixture
def task(cached, random_models, tmp_path) -> DistillTask:
    made = DistillTask(recipe(cached, random_models, tmp_path))
    for name, value in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)  # a LoRA that has learnt something
    return made


def test_the_teacher_samples_as_the_pipeline_does_and_without_the_lora(task, random_models):
    batch = task.dataset[0]
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0))
    pipeline = Pipeline.load(random_models)
    assert 0.75 < pipeline.config.guided_above < 1  # the first of three steps is guided
    tokens = [pipeline.dit.embed_condition(states) for states in (batch.states, batch.negative)]
    x, times = noise, torch.linspace(1.0, 0.25, 4)
    with torch.no_grad():
        for t, following in pairwise(times):
            positive, negative = (pipeline.dit(x, batch.source, batch.reference, each, t.expand(len(x))) for each in tokens)
            x = x + (following - t) * (negative + (3.0 if t > pipeline.config.guided_above else 1.0) * (positive - negative))
    assert torch.allclose(task.solve(batch, noise, 1.0, 0.25), x, atol=1e-5)
    with torch.no_grad():
        changed = task.model(noise, batch.source, batch.reference, task.model.embed_condition(batch.states), torch.ones(len(noise)))
        with without_lora(task.model):
            plain = task.model(noise, batch.source, batch.reference, task.model.embed_condition(batch.states), torch.ones(len(noise)))
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert all(value.requires_grad for value in task.modules["lora"].parameters())


def test_a_window_is_straight():
    start, end, places = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2), torch.tensor([1.0, 0.25])
    path = between(start, end, 0.8, 0.3, places)
    assert torch.equal(path.t, torch.tensor([0.8, 0.425])) and torch.allclose(path.x_t[0], start[0])
    assert torch.allclose(path.x_t - (path.t - 0.3).view(-1, 1, 1, 1, 1) * path.velocity, end, atol=1e-6)


def test_the_windows_are_the_students_steps(task, monkeypatch):
    """Their upper ends are targets with noise, their lower ends the teacher's, and every point between leads from one to the other."""
    batch, solved, learnt = task.dataset[0], [], []
    solve = task.solve
    monkeypatch.setattr(task, "solve", lambda batch, x, upper, lower: solved.append((x, solve(batch, x, upper, lower), upper, lower)) or solved[-1][1])
    monkeypatch.setattr(distill, "velocity_losses", lambda model, batch, states, path, *_, **__: learnt.append(path) or {"loss": states.sum()})
    for step in range(6):
        task.loss(step, batch, torch.Generator().manual_seed(step))
    for (start, end, upper, lower), path in zip(solved, learnt):
        assert ((lower <= path.t) & (path.t <= upper)).all() and not torch.allclose(start, end)
        share = lambda time, path=path: (time - path.t).view(-1, 1, 1, 1, 1)
        assert torch.allclose(path.x_t + share(upper) * path.velocity, start, atol=1e-5)
        assert torch.allclose(path.x_t + share(lower) * path.velocity, end, atol=1e-5)
    times = schedule(2, task.config.shift).tolist()
    assert {(upper, lower) for *_, upper, lower in solved} == set(pairwise(times))


def test_the_lora_brings_its_sampling_settings(cached, random_models, tmp_path):
    task = DistillTask(recipe(cached, random_models, tmp_path))
    run(task)
    assert [json.loads(line)["loss"] > 0 for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == [True] * 3
    path, base = tmp_path / "few.safetensors", read_config(random_models / "dit.safetensors")
    assert sampling_of(read_lora(path).metadata) == {"steps": 2, "shift": base.shift, "cfg": 1.0}
    sampled = replace(base, steps=2, cfg=1.0)
    assert Pipeline.load(random_models, loras=[(path, 1.0)]).config == sampled
    assert Pipeline.load(random_models, loras=[(path, 0.0)]).config == base
    merge(random_models, [(path, 1.0)], tmp_path / "merged.safetensors")
    assert read_config(tmp_path / "merged.safetensors") == sampled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_steps": 0}, "needs a student_steps.*got 0; expected 1 or more"),
        ({"lora_rank": 0}, "needs a lora_rank"),
        ({"condition_dropout": 0.1}, "no use for condition_dropout"),
        ({"new_parts": "trained"}, "trains a LoRA alone"),
    ],
)
def test_what_a_distillation_cannot_do_is_refused(cached, random_models, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        DistillTask(recipe(cached, random_models, tmp_path, **changes))


def test_guidance_needs_the_empty_instruction(cached, random_models, tmp_path):
    with pytest.raises(UserError, match="guidance needs the states of an empty instruction.*got guidance 3"):
        DistillTask(recipe(cached, random_models, tmp_path, caches=[str(cached / "without")]))
    DistillTask(recipe(cached, random_models, tmp_path, caches=[str(cached / "without")], teacher_cfg=1.0))


def test_settings_that_cannot_be_are_refused():
    for text in ('{"steps": -2, "shift": 5, "cfg": 1}', '{"steps": 2}', "[1]", "{", '{"steps": 1e999, "shift": 5, "cfg": 1}'):
        with pytest.raises(UserError, match="sampling settings cannot be read"):
            sampling_of({SAMPLING_KEY: text})


@pytest.fixture
def pairs(tmp_path):
    return export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 2), tmp_path / "pairs")


def command(pairs, models, output, *more: str) -> list[str]:
    return ["distill", "--manifest", str(pairs), "--models", str(models), "--output", str(output), "--num-steps", "2", "--rank", "2", *more]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_command_from_pairs_to_a_lora(pairs, random_models, tmp_path, capsys, dtype):
    output = tmp_path / "few.safetensors"
    arguments = command(pairs, random_models, output, "--steps", "3", "--teacher-steps", "2", "--teacher-cfg", "2", "--dtype", dtype)
    assert main(arguments) == 0
    file = read_lora(output)
    assert sampling_of(file.metadata) == {"steps": 3, "shift": read_config(random_models / "dit.safetensors").shift, "cfg": 1.0}
    assert {down.shape[0] for down, _ in file.adapters.values()} == {2}
    assert any(up.abs().max() > 0 for _, up in file.adapters.values())
    values = yaml.safe_load((tmp_path / "few" / "recipe.yaml").read_text())
    assert values["teacher_cfg"] == 2 and values.get("bf16", False) == (dtype == "bf16") and read_index(tmp_path / "few" / "cache")["contract"]["negative"]
    before = output.read_bytes()
    assert main(arguments) == 0 and output.read_bytes() == before  # nothing is left to do
    assert "a LoRA for 3 steps without guidance" in capsys.readouterr().out


def test_an_unguided_editor_needs_no_empty_instruction(pairs, random_models, tmp_path):
    assert read_config(random_models / "dit.safetensors").cfg == 1.0
    assert main(command(pairs, random_models, tmp_path / "few.safetensors", "--teacher-steps", "1")) == 0
    assert not read_index(tmp_path / "few" / "cache")["contract"].get("negative")


@pytest.mark.parametrize(
    "more, said",
    [
        (["--models", "nowhere"], "no such file"),
        (["--output", "few.ckpt"], "unsupported file type"),
        (["--manifest", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "-1"], "--batch-size"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_anything_is_encoded(pairs, random_models, tmp_path, capsys, more, said):
    assert main(command(pairs, random_models, tmp_path / "few.safetensors", *more)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "few").exists()


def test_several_processes_would_encode_the_same(pairs, random_models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(pairs, random_models, tmp_path / "few.safetensors")) == 2
    assert "each process would write the same files; got 2 processes; encode the pairs with" in capsys.readouterr().err and not (tmp_path / "few").exists()
