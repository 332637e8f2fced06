"""Two processes that train together do what one does with twice the batches."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.pipeline import check_compiler
from mive_core.train.cache import Encoders, cache
from mive_core.train.distributed import ProcessGroup
from mive_core.train.tasks import train

STEPS = 20


def test_the_batches_of_a_step_are_shared_out_and_none_is_left_over():
    for size in (1, 2, 3):
        for step in range(3):
            shared = [number for rank in range(size) for number in ProcessGroup(rank, size).batches_of(step, 2)]
            assert shared == list(range(step * 2 * size, (step + 1) * 2 * size))


@pytest.fixture(scope="module")
def pairs(random_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5, kinds=("seen in reference",)), 6), folder / "pairs")
    cache(read_manifest(manifest), Encoders.load(random_models), folder / "cache")
    return folder / "cache"


def recipe(folder: Path, pairs, random_models, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(pairs)],
        "num_steps": STEPS,
        "learning_rate": 1e-3,
        "num_warmup_steps": 5,
        "output_dir": str(folder / "run"),
        "export": str(folder / "out.safetensors"),
        "num_workers": 0,
        "log_every": 1,
        "ema_decay": 0.9,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train_by_two(path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "mive_core", "train", str(path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, others",
    [({"lora_rank": 2}, {}), ({"lora_rank": 2, "new_parts": "trained"}, {}), ({}, {}), ({}, {"sharded": True, "gradient_checkpointing": True})],
    ids=["lora", "new_parts", "full", "sharded"],
)
def test_two_processes_equal_one_with_accumulation(pairs, random_models, tmp_path, changes, others):
    train(recipe(tmp_path / "one", pairs, random_models, gradient_accumulation_steps=2, **changes))
    train_by_two(recipe(tmp_path / "two", pairs, random_models, **changes, **others))
    one, two = ([json.loads(line) for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == STEPS and len({line["loss"] for line in one}) == STEPS
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4 * (1 + a["grad_norm"])
    a, b = (load_file(tmp_path / name / "out.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a) and a.keys() == b.keys()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_resume_bit_for_bit(pairs, random_models, tmp_path, sharded):
    """A run that was cut off in its sixth step, for the checkpoint after the fourth is the newest."""
    changes = {"num_steps": 8, "sharded": sharded, "checkpoint_every_s": 0.0, "num_checkpoints": 9}
    train_by_two(recipe(tmp_path / "whole", pairs, random_models, **changes))
    path = recipe(tmp_path / "halves", pairs, random_models, **changes)
    (tmp_path / "halves" / "run").mkdir()
    newest = "step_00000004.safetensors"
    (tmp_path / "halves" / "run" / newest).write_bytes((tmp_path / "whole" / "run" / newest).read_bytes())
    train_by_two(path)
    whole, halves = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    assert len((tmp_path / "halves" / "run" / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_validate_as_one(pairs, random_models, tmp_path, sharded):
    """Each edits half of the pairs, with weights that are whole or shared."""
    changes = {
        "num_steps": 4,
        "validate_every": 2,
        "validation_manifest": str(pairs.parent / "pairs" / "pairs.jsonl"),
        "validation_cache": str(pairs),
        "validation_vae": str(random_models),
        "validation_pairs": 3,
    }
    train(recipe(tmp_path / "one", pairs, random_models, gradient_accumulation_steps=2, **changes))
    train_by_two(recipe(tmp_path / "two", pairs, random_models, sharded=sharded, **changes))
    one, two = ([json.loads(line) for line in (tmp_path / name / "run" / "validation.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 3]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3)
    assert one[0]["loss"] != one[1]["loss"]
    folder = tmp_path / "two" / "run" / "validation" / "step_00000003"
    assert {path.name for path in folder.iterdir()} == {"edited", "report.json", "sheet.png", "process_1"}
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_sharded_in_bf16_with_what_waits_in_main_memory(pairs, random_models, tmp_path):
    """As configs/paper_14b_8xh100.yaml has it: weights are put together in bf16, blocks' inputs leave the device. Rounding differs a little."""
    changes = {"bf16": True, "gradient_checkpointing": True, "offload": True, "attention": "sdpa", "num_steps": 6, "checkpoint_every_s": 0.0}
    train(recipe(tmp_path / "one", pairs, random_models, gradient_accumulation_steps=2, **changes))
    train_by_two(recipe(tmp_path / "two", pairs, random_models, sharded=True, **changes))
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=0.01)
    stored = load_file(max((tmp_path / "two" / "run").glob("step_*")))
    assert {value.dtype for value in stored.values()} == {torch.float32}


@pytest.mark.slow
def test_sharded_and_compiled(pairs, random_models, tmp_path):
    try:
        check_compiler("cpu")
    except UserError as error:
        pytest.skip(str(error))
    changes = {"gradient_checkpointing": True, "num_steps": 4}
    train(recipe(tmp_path / "one", pairs, random_models, gradient_accumulation_steps=2, **changes))
    train_by_two(recipe(tmp_path / "two", pairs, random_models, sharded=True, compiled=True, **changes))
    one, two = ([json.loads(line)["loss"] for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)


def test_sharding_needs_company(pairs, random_models, tmp_path):
    with pytest.raises(UserError, match="takes several processes; got one; start it with torchrun"):
        train(recipe(tmp_path, pairs, random_models, sharded=True))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"sharded": True}], ids=["lora", "sharded"])
def test_two_processes_skip_the_same_steps_and_end_together(pairs, random_models, tmp_path, changes):
    """A pair of one process's batch is damaged: its target is not finite."""
    broken = tmp_path / "cache"
    shutil.copytree(pairs, broken)
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    first = next(key for key in sorted(tensors) if key.endswith(".target"))
    save_file(tensors | {first: torch.full_like(tensors[first], torch.nan)}, shard)
    train_by_two(recipe(tmp_path / "two", broken, random_models, num_steps=6, **changes))  # six pairs, two a step: one step of three is skipped
    lines = [json.loads(line) for line in (tmp_path / "two" / "run" / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and sum(line.get("skipped_steps", 0) for line in lines) == 2 and sum(line["loss"] is None for line in lines) == 2
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "two" / "out.safetensors").values())
    everything = {key: torch.full_like(value, torch.nan) if key.endswith(".target") else value for key, value in tensors.items()}
    save_file(everything, shard)
    with pytest.raises(AssertionError, match="5 steps in a row were not finite"):
        train_by_two(recipe(tmp_path / "none", broken, random_models, **changes))
    assert not (tmp_path / "none" / "out.safetensors").exists() and not list((tmp_path / "none" / "run").glob("step_*"))
