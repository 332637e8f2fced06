"""What goes wrong around a training: it is killed, the disk is full, what it is given does not fit. Nothing is lost, and a line says what it was."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mive_core.attention import torch_attention
from mive_core.cli import main
from mive_core.config import PRESETS
from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.dit import MiVEDiT
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.formats.checkpoint import save_dit
from mive_core.train.cache import Encoders, cache
from mive_core.train.tasks import train

STEPS = 16


@pytest.fixture(scope="module")
def cached(random_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 4), folder / "pairs")
    cache(read_manifest(manifest), Encoders.load(random_models), folder / "cache")
    return folder / "cache"


def recipe(folder: Path, cached, random_models, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(cached)],
        "num_steps": STEPS,
        "learning_rate": 1e-3,
        "num_warmup_steps": 5,
        "output_dir": str(folder / "run"),
        "export": str(folder / "out.safetensors"),
        "num_workers": 0,
        "log_every": 1,
        "ema_decay": 0.9,
        "checkpoint_every_s": 0.0,
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def started(path: Path, num_processes: int = 1, **options) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if num_processes > 1:
        environment["WORLD_SIZE"] = str(num_processes)
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mive_core", "train", str(path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for rank in range(num_processes)
    ]


def ended(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-2000:]


def killed_after(path: Path, num_processes: int, step: int, delay: float) -> None:
    """Starts a run, and kills it when the checkpoint of that step is there and a moment has passed: most likely while it writes another."""
    processes, deadline = started(path, num_processes), time.monotonic() + 200
    while not list((path.parent / "run").glob(f"step_{step:08d}*")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), [
            p.stderr.read()[-2000:] for p in processes if p.poll() is not None
        ]
        time.sleep(0.002)
    time.sleep(delay)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_processes, steps, changes",
    [
        (1, (3, 9), {"lora_rank": 2, "gradient_accumulation_steps": 2}),
        (1, (5,), {"gradient_checkpointing": True}),
        (2, (5,), {"lora_rank": 2}),
        (2, (5,), {"sharded": True}),
    ],
    ids=["lora", "full", "two", "sharded"],
)
def test_killed_it_ends_bit_equal(cached, random_models, tmp_path, num_processes, steps, changes):
    ended(started(recipe(tmp_path / "whole", cached, random_models, **changes), num_processes))
    path, moments = recipe(tmp_path / "killed", cached, random_models, **changes), random.Random(7)
    for step in steps:
        killed_after(path, num_processes, step, moments.uniform(0, 0.05))
    (tmp_path / "killed" / "run" / ".step_00000099.1.partial.safetensors").write_bytes(b"as a kill in the middle of a write leaves it")
    ended(started(path, num_processes))
    whole, killed = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    logs = [[json.loads(line) for line in (tmp_path / name / "run" / "log.jsonl").read_text().splitlines()] for name in ("whole", "killed")]
    assert next([(line["step"], line["loss"]) for line in log] for log in logs) == [(line["step"], line["loss"]) for line in logs[1]]
    assert not list((tmp_path / "killed" / "run").glob(".*"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(cached, random_models, tmp_path):
    """Files may grow to half a checkpoint: the log is written, the next checkpoint is not."""
    train(recipe(tmp_path / "whole", cached, random_models))
    path = recipe(tmp_path / "full", cached, random_models)
    killed_after(path, 1, 3, 0.0)
    folder = tmp_path / "full" / "run"
    before = {file.name: file.read_bytes() for file in folder.glob("step_*")}
    half = max(map(len, before.values())) // 2
    (process,) = started(path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2 and "could not be written" in errors and "check space" in errors and "Traceback" not in errors
    assert {file.name: file.read_bytes() for file in folder.glob("step_*")} == before and not list(folder.glob(".*"))
    train(path)
    whole, full = (load_file(tmp_path / name / "out.safetensors") for name in ("whole", "full"))
    assert all(torch.equal(whole[key], full[key]) for key in whole)


def damage_layers(folder, cached, random_models):
    (folder / "cache").mkdir()
    for file in cached.iterdir():
        (folder / "cache" / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / "cache" / "index.json").read_text())
    index["contract"]["layers"] = [2, 4]
    (folder / "cache" / "index.json").write_text(json.dumps(index))
    return recipe(folder, folder / "cache", random_models)


def give_other_models(folder, cached, random_models):
    path = damage_layers(folder, cached, random_models)
    index = json.loads((folder / "cache" / "index.json").read_text())
    index["contract"] |= {"layers": [1, 4], "models": "of another VAE"}
    (folder / "cache" / "index.json").write_text(json.dumps(index))
    return recipe(path.parent, cached, random_models, caches=[str(cached), str(folder / "cache")])


def save_other(path, **changes) -> Path:
    config = replace(PRESETS["tiny"], num_blocks=1, **changes)
    save_dit(path, MiVEDiT(config, operations=torch.nn, attention=torch_attention).state_dict(), config)
    return path


def start_from_another_vlm(folder, cached, random_models):
    return recipe(folder, cached, random_models, start_from=str(save_other(folder / "other.safetensors", vlm_width=256)))


def exchange_what_it_started_from(folder, cached, random_models):
    """The recipe is the same word for word, the file that it names is not."""
    path = recipe(folder, cached, random_models, start_from=str(save_other(folder / "own.safetensors")), num_steps=2)
    train(path)
    save_other(folder / "own.safetensors", ffn_width=384)
    return path


def start_from_a_vae(folder, cached, random_models):
    return recipe(folder, cached, random_models, start_from=str(random_models / "vae.safetensors"))


def spell_wrongly(folder, cached, random_models):
    return recipe(folder, cached, random_models, lora_rang=8)


def name_a_missing_checkpoint(folder, cached, random_models):
    return recipe(folder, cached, random_models, start_from="nowhere.safetensors")


@pytest.mark.parametrize(
    "prepare, message",
    [
        (damage_layers, "made for other layers; got [2, 4]; expected [1, 4]"),
        (give_other_models, "made by another VAE or VLM than the first one"),
        (start_from_another_vlm, "made for other vlm_width; got 128; expected 256"),
        (exchange_what_it_started_from, "the checkpoint there is of other shapes; got blocks.0.ffn.0.bias of (1024,); expected (384,)"),
        (start_from_a_vae, "this looks like a Wan VAE"),
        (spell_wrongly, "unknown keys in the recipe; got lora_rang"),
        (name_a_missing_checkpoint, "no such file or folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(cached, random_models, tmp_path, capsys, prepare, message):
    path = prepare(tmp_path, cached, random_models)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert main(["train", str(path)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mive: ")]
    assert message in line
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("package, changes", [("peft", {"lora_rank": 1}), ("torchao", {"optimizer": "adamw_8bit"}), ("wandb", {"wandb": "mive"})])
def test_a_missing_package_is_named(cached, random_models, tmp_path, capsys, monkeypatch, package, changes):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert main(["train", str(recipe(tmp_path, cached, random_models, **changes))]) == 2
    assert f"needs the package {package}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("step_*"))
