"""A plan of a training: its figures are the budget's, and what a real run of the recipe holds, writes and counts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mive_core.bench.memory_counter import MemoryCounter
from mive_core.cli import main
from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.train.budget import CARDS, clip_layout, scaling_report, training_memory
from mive_core.train.edit_task import EditTask
from mive_core.train.loop import run
from mive_core.train.plan import PlanOptions, plan

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def recipe_file(folder: Path, **changes) -> Path:
    values = {
        "task": "edit",
        "start_from": str(folder / "models" / "dit.safetensors"),
        "caches": [str(folder / "cache")],
        "output_dir": str(folder / "run"),
        "export": str(folder / "out.safetensors"),
        "num_steps": 2,
        "num_workers": 0,
        "num_checkpoints": 1,
        "gradient_checkpointing": True,
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def build(path: Path) -> EditTask:
    from mive_core.train.edit_task import build

    return build(yaml.safe_load(path.read_text()), path)


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}, {"lora_rank": 4}], ids=["full", "averaged", "lora"])
def test_a_real_run_holds_and_writes_what_the_plan_says(from_wan, changes):
    path = recipe_file(from_wan, **changes)
    report, task = plan(path), build(path)
    trained = [p for module in task.modules.values() for p in module.parameters()]
    assert report["trained"]["total"] == sum(report["trained"]["parts"].values()) == sum(p.numel() for p in trained)
    (sequence,) = report["sequences"]  # of the size; the instructions differ in length
    assert report["sequences_named_by"] == "caches" and (sequence["size"], sequence["frames"], sequence["pairs"]) == ([160, 96], 17, 2)
    assert sequence["tokens"] == max(task.workload(task.dataset[i]).num_tokens for i in range(2))
    run(task)
    (checkpoint,) = (from_wan / "run").glob("step_*.safetensors")
    disk = report["disk"]
    assert disk["checkpoint_bytes"] == pytest.approx(checkpoint.stat().st_size, rel=0.02)
    assert disk["export_bytes"] == pytest.approx((from_wan / "out.safetensors").stat().st_size, rel=0.02)
    shards = sum(p.stat().st_size for p in (from_wan / "cache").glob("*.safetensors"))
    assert disk["states"] == "fp8" and disk["pairs"] == 2 and disk["cache_bytes"] == pytest.approx(shards, rel=0.02)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}], ids=["full", "lora"])
def test_a_real_step_holds_the_memory_of_the_plan(from_wan, changes):
    path = recipe_file(from_wan, **changes)
    memory, task = plan(path)["memory"], build(path)
    batch = task.dataset[0]
    with MemoryCounter() as counted:
        task.loss(0, batch, torch.Generator().manual_seed(0))["loss"].backward()
    assert memory["activations"] + memory["gradients"] == pytest.approx(counted.peak, rel=0.15)  # the last gradients come after the peak
    with MemoryCounter() as counted:
        task.optimizers["adamw"].step()
    assert memory["optimizer"] == pytest.approx(counted.current, rel=0.02)


def test_the_plan_is_the_budget():
    """Of the paper's recipe: the same figures as `mive bench scale`."""
    options = PlanOptions("14b", buckets=((1280, 720, 81),), card="H100", num_cards=8)
    report = plan(CONFIGS / "paper_14b_8xh100.yaml", options)
    (row,) = (r for r in scaling_report()["rows"] if (r["size"], r["cards"], r["offload"]) == ([1280, 720], 8, True))
    assert report["memory"]["total"] == row["memory_bytes"] and report["time"]["seconds_a_step"] == row["seconds_a_step"]
    assert report["time"]["hours"] == pytest.approx(8000 * row["seconds_a_step"] / 3600) and report["card"]["fits"] == row["fits"]
    assert (
        report["sequences"][0]["tokens"] == row["tokens"]
        and report["card"]["number"] == plan(CONFIGS / "paper_14b_8xh100.yaml", PlanOptions("14b"))["card"]["number"]
    )


def test_from_a_converted_wan_the_new_parts_are_counted(recipes):
    """They are trained beside the LoRA; a preset stands for a converted Wan."""
    recipe = recipes["lora_14b_1x24gb"]
    report = plan(CONFIGS / "lora_14b_1x24gb.yaml", PlanOptions("14b"))
    assert report["model"]["untrained"] == ["context", "patch_embedding"] and set(report["trained"]["parts"]) == {
        *recipe.lora_targets,
        "context",
        "patch_embedding",
    }
    tokens = clip_layout((832, 480), 81).num_tokens
    alone, both = (training_memory(replace(recipe, new_parts=""), PRESETS["14b"], tokens, untrained=untrained).total for untrained in (False, True))
    new = sum(report["trained"]["parts"][name] for name in report["model"]["untrained"])
    assert report["memory"]["total"] == both == pytest.approx(alone + 14 * new, rel=1e-6)  # 2 bytes more of the weight, gradient and two moments in float32
    assert report["card"]["name"] == "RTX 3090" and report["main_memory"]["blocks_inputs"] == 40 * tokens * 5120 * 2


def test_what_a_recipe_leaves_open_can_be_said():
    path = CONFIGS / "lora_14b_1x24gb.yaml"
    plain, other = plan(path, PlanOptions("1.3b")), plan(path, PlanOptions("1.3b", "2b", ((832, 480, 33), (480, 832, 33)), "fp8", 50, "RTX 4090", 2, 0.9))
    assert other["model"]["vlm"] == "Qwen3-VL-2B" and other["trained"]["parts"]["context"] < plain["trained"]["parts"]["context"]
    assert other["disk"]["pairs"] == 50 and other["disk"]["cache_bytes"] == pytest.approx(50 * other["disk"]["cache_bytes_a_pair"], abs=50)
    assert [s["frames"] for s in other["sequences"]] == [33, 33] and other["disk"]["cache_bytes_a_pair"] < 0.5 * plain["disk"]["cache_bytes_a_pair"]
    faster = plan(path, PlanOptions("1.3b", card="RTX 4090", share_of_peak=0.9))["time"]
    slower = plan(path, PlanOptions("1.3b", card="RTX 4090"))["time"]
    assert faster["hours"] == pytest.approx(slower["hours"] / 2) and other["time"]["pairs_a_step"] == 2 * slower["pairs_a_step"]
    assert plain["card"]["bytes"] == CARDS["RTX 4080"]  # the smallest that it fits


def test_the_command_prints_the_plan_and_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(CONFIGS / "lora_14b_1x24gb.yaml")
    assert main(["train", path, "--plan", "--preset", "14b", "--json", "plan.json"]) == 0
    printed, written = capsys.readouterr().out, json.loads(Path("plan.json").read_text())
    assert "reads Qwen3-VL-8B" in printed and "1 x RTX 3090, 24 GB: the memory fits" in printed and "assumed, not measured" in printed
    assert written["command"].startswith("mive train") and written["memory"]["total"] > 1e10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]  # nothing is trained
    assert main(["train", path, "--plan", "--preset", "14b", "--card", "RTX 4080"]) == 0 and "DOES NOT FIT" in capsys.readouterr().out
    assert main(["train", str(CONFIGS / "tiny_cpu.yaml"), "--plan"]) == 0
    assert "not estimated for a CPU" in (printed := capsys.readouterr().out) and "160x96x33" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["lora_14b_1x24gb", "--plan"],
            "no such checkpoint; `mive init-from-wan WAN models/dit.safetensors` and `mive quantize models/dit.safetensors models/dit_fp8.s",
        ),
        (["full_1p3b_1x80gb", "--plan"], "`mive init-from-wan WAN models/dit.safetensors` makes it; `--preset 14b`"),
        (["full_1p3b_1x80gb", "--card", "H100"], "only a plan takes that; got --card; add --plan"),
        (["full_1p3b_1x80gb", "--plan", "--vlm", "2b"], "--vlm without --preset"),
        (["tiny_dit", "--plan"], "unknown task; got dit; expected edit"),
        (["full_1p3b_1x80gb", "--plan", "--preset", "14b", "--json", "plan.txt"], "unsupported file type"),
    ],
)
def test_a_plan_that_cannot_be_says_why(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / f"{arguments[0]}.yaml"), *arguments[1:]]) == 2
    message = capsys.readouterr().err
    assert said in message.replace("start_from 'models/dit_fp8.safetensors': ", ""), message


def test_a_recipe_that_cannot_be_has_no_plan(tmp_path):
    with pytest.raises(UserError, match="weights in 8 bits are not trained"):
        plan(recipe_file(tmp_path, float8="kept"))
