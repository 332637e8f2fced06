"""What configs/ offers: every recipe is read whole, what it sets can work together, and the small one runs."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mive_core.attention import torch_attention
from mive_core.cli import main
from mive_core.formats.checkpoint import load_dit, read_config
from mive_core.formats.lora_file import read_lora
from mive_core.formats.untrained import untrained_parts
from mive_core.train.edit_task import EditRecipe, check_edit_recipe
from mive_core.train.flow_matching import FlowMatchingRecipe, check_recipe
from mive_core.train.lora import TARGETS
from mive_core.train.recipe import read_recipe
from mive_core.train.tasks import train

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
EDIT_PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if read_recipe(path)["task"] == "edit")
SMALL = {  # what the walk replaces in a preset: the machine, and how long it is
    "device": "cpu",
    "sharded": False,
    "num_workers": 0,
    "num_steps": 2,
    "log_every": 1,
}


def test_every_recipe_is_read_and_what_it_sets_can_work_together(recipes):
    assert {
        "paper_14b_8xh100",
        "lora_14b_1x24gb",
        "lora_1p3b_1x24gb",
        "lora_1p3b_1x16gb",
        "full_1p3b_1x80gb",
        "tiny_cpu",
        "tiny_dit_start",
        "tiny_dit",
    } <= recipes.keys()
    for name, recipe in recipes.items():
        if isinstance(recipe, FlowMatchingRecipe):
            check_recipe(replace(recipe, device="cpu"), name)
        if isinstance(recipe, EditRecipe):
            check_edit_recipe(recipe, name)


def test_an_unknown_key_is_an_error(tmp_path, capsys):
    text = (CONFIGS / "tiny_cpu.yaml").read_text() + "leraning_rate: 1\n"
    (tmp_path / "typo.yaml").write_text(text)
    assert main(["train", str(tmp_path / "typo.yaml")]) == 2
    assert "unknown keys in the recipe; got leraning_rate" in capsys.readouterr().err


def commands_of(name: str) -> list[list[str]]:
    """The commands in a preset's first lines, on a CPU and for clips of 64x48x5."""
    lines = [line.removeprefix("#   mive ") for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("#   mive ")]
    small = [re.sub(r"--bucket \S+", "--bucket 64x48x5", line).replace("--device cuda --dtype bf16", "") for line in lines]
    assert small, "a preset says how to make what it starts from"
    return [line.split() for line in small]


@pytest.mark.slow
@pytest.mark.parametrize("name", EDIT_PRESETS)
def test_every_preset_starts_from_what_its_commands_make_and_takes_two_steps(name, small_wan, vae_and_vlm, tiny_vlm_sizes, tmp_path, monkeypatch):
    """Its own keys, at small shapes, from Wan's weights to the finished file."""
    monkeypatch.chdir(tmp_path)
    for command in commands_of(name):
        if command[0] == "init-from-wan":
            shutil.copyfile(small_wan, command[1])
        for manifest in ("pairs.jsonl", "heldout.jsonl"):
            if manifest in command:
                assert main(f"data synth --output {manifest.split('.')[0]} --num 2 --split train --size 64x48 --frames 5".split()) == 0
                command[command.index(manifest)] = f"{manifest.split('.')[0]}/pairs.jsonl"
        assert main(command) == 0, command
    values = read_recipe(CONFIGS / f"{name}.yaml")
    untrained = values["start_from"] != "tiny" and untrained_parts(Path(values["start_from"]))
    small = SMALL | ({"validation_pairs": 1, "validation_steps": 1} if "validation_manifest" in values else {})
    if values.get("validation_manifest") == "heldout.jsonl":
        small["validation_manifest"] = "heldout/pairs.jsonl"
    Path("small.yaml").write_text(yaml.safe_dump(values | small))
    train("small.yaml")
    log = [json.loads(line) for line in Path(values["output_dir"], "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [0, 1] and all(line["loss"] > 0 for line in log)
    export = Path(values["export"])
    if values.get("lora_rank"):
        lora = read_lora(export)
        assert {layer.split(".", 2)[2] for layer in lora.adapters} == set(TARGETS) and all(up.any() for _, up in lora.adapters.values())
        assert bool(lora.differences) == (bool(untrained) or values.get("new_parts") == "trained") and not lora.unread
        if untrained:
            assert lora.differences["patch_embedding.weight"][:, 16:].any() and lora.differences["context.fuse.weight"].any()
            assert lora.base_config == read_config(Path(values["start_from"]))
    else:
        trained = load_dit(export, attention=torch_attention)
        assert untrained and untrained_parts(export) == () and trained.patch_embedding.weight[:, 16:].any()


@pytest.mark.slow
def test_the_small_preset_runs_by_the_commands_that_it_names(tmp_path, monkeypatch):
    """With fewer pairs and steps; the commands stand in its first lines."""
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "tiny_cpu.yaml").read_text()
    commands = [line.removeprefix("#   mive ") for line in text.splitlines() if line.startswith("#   mive ")]
    assert len(commands) == 3
    for command in commands:
        assert main(command.split()) == 0
    values = yaml.safe_load(text) | {"num_steps": 3, "num_warmup_steps": 1, "validate_every": 2, "validation_steps": 1, "log_every": 1}
    Path("short.yaml").write_text(yaml.safe_dump(values))
    train("short.yaml")
    assert len(load_file("runs/tiny_cpu/lora.safetensors")) == 2 * 6 * 12
    lines = [json.loads(line) for line in Path("runs/tiny_cpu/run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[-1]["tokens_per_second"] > 0
    validated = [json.loads(line) for line in Path("runs/tiny_cpu/run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validated] == [-1, 1, 2] and validated[0]["psnr_edited"] < validated[0]["psnr_edited_ceiling"]
    assert Path("runs/tiny_cpu/run/validation/start/report.json").is_file()
    before = sorted(Path("runs").rglob("*"))
    assert main(["bench", "train", "short.yaml", "--steps", "2", "--json", "bench.json"]) == 0
    report = json.loads(Path("bench.json").read_text())
    assert report["steps"] == 2 and report["computing_share"] > 0.5 and report["tokens_per_second"] > 0
    assert sorted(Path("runs").rglob("*")) == before  # it leaves nothing


@pytest.mark.slow
def test_scale_on_paper_from_the_command_line(tmp_path, capsys):
    assert main(["bench", "scale", "--preset", "1.3b", "--json", str(tmp_path / "scale.json")]) == 0
    report = json.loads((tmp_path / "scale.json").read_text())
    assert report["preset"] == "1.3b" and report["command"].startswith("mive bench scale") and len(report["rows"]) == 12
    assert main(["bench", "scale", "--frames", "80"]) == 2 and "expected 4n+1" in capsys.readouterr().err
