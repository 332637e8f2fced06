"""A run whose numbers are no longer finite: single steps are skipped, several in a row end it, and nothing of them is written.

A learning rate of 1e9 once trained 40 steps of NaN, exported them and ended with 0; its log was no JSON.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from line_task import LineTask, recipe
from safetensors.torch import load_file

from mive_core.cli import main
from mive_core.config import PRESETS
from mive_core.data.manifest import export_pairs, read_manifest
from mive_core.embedded.heldout import drawn_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.errors import UserError
from mive_core.formats.checkpoint import save_dit
from mive_core.formats.lora_file import write_lora
from mive_core.train.cache import Encoders, cache
from mive_core.train.finite import MAX_SKIPPED_STEPS, NotFinite
from mive_core.train.loop import run

pytestmark = pytest.mark.filterwarnings("ignore:step .* is skipped")


class Broken(LineTask):
    """Gives losses that are not finite in chosen steps."""

    def __init__(self, recipe, steps, factor=math.nan):
        super().__init__(recipe)
        self.steps, self.factor = steps, factor

    def loss(self, step, batch, generator):
        losses = super().loss(step, batch, generator)
        return {"loss": losses["loss"] * self.factor} if step in self.steps else losses


class BrokenGradient(Broken):
    """The loss stays finite, its gradient does not."""

    def loss(self, step, batch, generator):
        loss = LineTask.loss(self, step, batch, generator)["loss"]
        return {"loss": loss + (torch.sqrt(loss * 0) if step in self.steps else 0)}


def log(folder: Path) -> list[dict]:
    """The lines of the log; NaN and Infinity, which no JSON has, are errors."""

    def refuse(name):
        raise AssertionError(f"{name} in the log")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "run" / f"step_{step:08d}.safetensors")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("task", [Broken, BrokenGradient])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, task, max_grad_norm):
    with pytest.warns(UserWarning, match="step 5 is skipped, since it is not finite: loss"):
        run(task(recipe(tmp_path, num_checkpoints=40, max_grad_norm=max_grad_norm), {4, 9, 10, 11, 12}))
    before, after = stored(tmp_path, 3), stored(tmp_path, 5)
    assert not (tmp_path / "run" / "step_00000004.safetensors").exists()  # none is due until a step is taken again
    skipping = task(recipe(tmp_path / "again", num_checkpoints=40, max_grad_norm=max_grad_norm, checkpoint_every_s=3600.0), set(range(4, 5)))

    class Stop(BaseException):
        pass

    def stop(step, losses):
        if step == 4:
            raise Stop

    with pytest.warns(UserWarning), pytest.raises(Stop):
        run(skipping, on_step_end=stop)
    kept = stored(tmp_path / "again", 4)
    assert before.keys() == kept.keys() and all(torch.equal(before[key], kept[key]) for key in before)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    lines = log(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped_steps")] == [4, 9, 10, 11, 12] and len(lines) == 30
    assert lines[4]["grad_norm"] is None and (lines[4]["loss"] is None) == (task is Broken)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "model.safetensors").values())


def test_the_log_counts_the_steps_skipped_since_its_last_line(tmp_path):
    with pytest.warns(UserWarning):
        run(Broken(recipe(tmp_path, log_every=10), {3, 4, 17}))
    assert [line.get("skipped_steps") for line in log(tmp_path)] == [None, 2, 1]


@pytest.mark.parametrize("log_every", [1, 20])
def test_several_in_a_row_end_the_run(tmp_path, log_every):
    with pytest.warns(UserWarning), pytest.raises(NotFinite, match="step 15: 5 steps in a row were not finite; got loss inf, gradient norm nan; lower"):
        run(Broken(recipe(tmp_path, log_every=log_every), range(10, 30), math.inf))
    assert max(path.name for path in (tmp_path / "run").glob("step_*")) == "step_00000009.safetensors"
    assert not (tmp_path / "model.safetensors").exists() and log(tmp_path)[-1]["step"] == 14
    with pytest.warns(UserWarning), pytest.raises(NotFinite, match="step 15"):  # a run that goes on meets the same steps
        run(Broken(recipe(tmp_path, log_every=log_every), range(10, 30)))
    run(LineTask(recipe(tmp_path, log_every=log_every)))
    assert [line["step"] for line in log(tmp_path)] == list(range(0, 30, log_every))


def test_a_run_too_short_for_that_is_no_success_either(tmp_path):
    with pytest.warns(UserWarning), pytest.raises(NotFinite, match="step 2: 2 steps in a row"):
        run(Broken(recipe(tmp_path, num_steps=2), range(9)))
    assert not list((tmp_path / "run").glob("step_*")) and not (tmp_path / "model.safetensors").exists()


class Poisoned(LineTask):
    """A weight is no longer finite after a step, though loss and gradient of that step were."""

    def after_step(self, step):
        if step == 6:
            self.modules["model"][0].weight.data[0, 0] = math.inf


def test_no_weight_that_is_not_finite_is_written(tmp_path):
    with pytest.raises(NotFinite, match="step 7: the weights are no longer finite, so they are not saved"):
        run(Poisoned(recipe(tmp_path)))
    assert max(path.name for path in (tmp_path / "run").glob("step_*")) == "step_00000005.safetensors"
    assert not (tmp_path / "model.safetensors").exists()


def test_nor_where_a_host_stops_the_run(tmp_path):
    class Cancelled(BaseException):
        pass

    def cancel(step, losses):
        if step == 6:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(Poisoned(recipe(tmp_path, checkpoint_every_s=3600.0)), on_step_end=cancel)
    assert not list((tmp_path / "run").glob("step_*"))


def test_a_file_of_such_weights_is_not_written(tmp_path):
    state = {"head.head.weight": torch.tensor([1e5])}
    with pytest.raises(UserError, match="a weight is not finite.*head.head.weight in torch.float16; take bf16 or fp32 instead of fp16"):
        save_dit(tmp_path / "dit.safetensors", state, PRESETS["tiny"], torch.float16)
    with pytest.raises(UserError, match="a weight is not finite"):
        write_lora(tmp_path / "lora.safetensors", {"a": (torch.ones(1, 2), torch.tensor([[math.nan]]))}, 1.0, {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"lora_rank": 2}, {"lora_rank": 2, "max_grad_norm": 0.0, "bf16": True}, {}], ids=["lora", "bf16", "full"])
def test_the_command_ends_with_an_error(random_models, tmp_path, capsys, changes):
    manifest = export_pairs(drawn_pairs(PairedEdits(5, "train", (32, 32), 5), 2), tmp_path / "pairs")
    cache(read_manifest(manifest), Encoders.load(random_models), tmp_path / "cache")
    values = {
        "task": "edit",
        "start_from": str(random_models / "dit.safetensors"),
        "caches": [str(tmp_path / "cache")],
        "num_steps": 40,
        "num_warmup_steps": 1,
        "num_workers": 0,
        "learning_rate": 1e9,
        "checkpoint_every_s": 0.0,
        "log_every": 1,
        "output_dir": str(tmp_path / "run"),
        "export": str(tmp_path / "out.safetensors"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | changes))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert f"{MAX_SKIPPED_STEPS} steps in a row were not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists() and log(tmp_path)[-1]["loss"] is None
    for path in (tmp_path / "run").glob("step_*"):
        assert all(torch.isfinite(value).all() for key, value in load_file(path).items() if not key.startswith("optimizer"))
