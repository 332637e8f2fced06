"""Where the figures of a run go, and what becomes of them when it is resumed."""

import json
import os

import pytest

from mive_core.errors import UserError
from mive_core.train.log import Log
from mive_core.train.recipe import Recipe


def recipe(folder, **changes) -> Recipe:
    return Recipe(task="line", output_dir=str(folder), export="none", num_steps=9, **changes)


def lines(folder, name="log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def write(folder, steps, first=0) -> None:
    log = Log(recipe(folder), first)
    for step in steps:
        log.write(step, {"loss": 0.5 * step})
        if step == 4:
            log.write(step, {"psnr": 20.0}, "validation")
    log.close()


def test_steps_that_are_done_again_are_logged_once(tmp_path):
    write(tmp_path, range(6))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut off by a crash
    write(tmp_path, range(3, 5), first=3)
    assert lines(tmp_path) == [{"step": step, "loss": 0.5 * step} for step in range(5)]
    assert lines(tmp_path, "validation.jsonl") == [{"step": 4, "psnr": 20.0}]


def test_tensorboard_has_the_same_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TENSORBOARD IS NOT INSTALLED")
    write(tmp_path, range(6))
    write(tmp_path, range(3, 5), first=3)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(step, 0.5 * step) for step in range(5)]
    assert [event.step for event in events.Scalars("validation/psnr")] == [4]


def test_what_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; a curve has no point there."""
    log = Log(recipe(tmp_path), 0)
    log.write(0, {"loss": float("nan"), "grad_norm": float("-inf"), "seconds": 1.0})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 0, "loss": null, "grad_norm": null, "seconds": 1.0}\n'
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="TENSORBOARD IS NOT INSTALLED")
    assert accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"] == ["train/seconds"]


def test_a_full_disk_is_one_clear_line(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("NO /dev/full ON THIS SYSTEM")
    log = Log(recipe(tmp_path), 0)
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="could not be written .No space left on device.*goes on from its last checkpoint"):
        log.write(0, {"loss": 1.0})
    log.close()


def test_a_missing_package_is_named(tmp_path):
    pytest.importorskip("torch")
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="wandb needs the package wandb"):
            Log(recipe(tmp_path, wandb="mive"), 0)
    else:
        pytest.skip("WANDB IS INSTALLED")


def test_weights_and_biases_are_told_too(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="WANDB IS NOT INSTALLED")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = Log(recipe(tmp_path, wandb="mive"), 0)
    log.write(0, {"loss": 1.0})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*"))
