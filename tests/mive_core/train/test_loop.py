import json
from pathlib import Path

import pytest
import torch
from line_task import LineTask, recipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mive_core.embedded.tasks import TASKS
from mive_core.errors import UserError
from mive_core.train.loop import _gradients, export_newest, run, step_seed
from mive_core.train.recipe import RENAMED, Recipe, parse_recipe
from mive_core.train.tasks import train


def exported(folder: Path, *, stop_at: int | None = None, damage=None, **changes) -> dict[str, torch.Tensor]:
    if stop_at is not None:
        run(LineTask(recipe(folder, **changes)), stop_at=stop_at)
        if damage is not None:
            damage(folder / "run")
    run(LineTask(recipe(folder, **changes)))
    return load_file(str(folder / "model.safetensors"))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_an_interrupted_run_ends_bit_equal(tmp_path):
    assert same(exported(tmp_path / "a"), exported(tmp_path / "b", stop_at=17))


def test_a_run_interrupted_between_checkpoints_repeats_the_lost_steps(tmp_path):
    def lose_newest(folder):
        max(folder.glob("step_*.safetensors")).unlink()

    assert same(exported(tmp_path / "a"), exported(tmp_path / "b", stop_at=17, damage=lose_newest))


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    def truncate(folder):
        newest = max(folder.glob("step_*.safetensors"))
        newest.write_bytes(newest.read_bytes()[:-40])

    assert same(exported(tmp_path / "a"), exported(tmp_path / "b", stop_at=17, damage=truncate))


class Cancelled(BaseException):
    """A host's word that the user pressed Cancel."""


def test_a_host_sees_every_step_and_stops_the_run_where_a_later_one_goes_on(tmp_path):
    """Without a checkpoint of its own the stop would lose 12 steps: the clock's next one is an hour away."""
    seen = []

    def cancel(step, losses):
        seen.append((step, float(losses["loss"])))
        if step == 11:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(LineTask(recipe(tmp_path / "b", checkpoint_every_s=3600.0)), on_step_end=cancel)
    assert [step for step, _ in seen] == list(range(12)) and not (tmp_path / "b" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "b" / "run").glob("step_*")] == ["step_00000011.safetensors"]
    run(LineTask(recipe(tmp_path / "b", checkpoint_every_s=3600.0)), on_step_end=lambda step, losses: seen.append((step, float(losses["loss"]))))
    assert [step for step, _ in seen] == list(range(30))
    assert same(exported(tmp_path / "a"), load_file(str(tmp_path / "b" / "model.safetensors")))
    logged = [json.loads(line) for line in (tmp_path / "b" / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in logged] == seen


def test_a_loading_process_changes_nothing(tmp_path):
    assert same(exported(tmp_path / "a"), exported(tmp_path / "b", num_workers=1))


def test_another_recipe_does_not_resume(tmp_path):
    run(LineTask(recipe(tmp_path)), stop_at=5)
    with pytest.raises(UserError, match="different lr"):
        run(LineTask(recipe(tmp_path, lr=0.5)))
    run(LineTask(recipe(tmp_path, log_every=7)), stop_at=6)  # how it logs is free to change


def test_the_log_holds_every_step_and_the_loss_falls(tmp_path):
    exported(tmp_path, num_steps=200)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(200))
    assert {"loss", "grad_norm", "seconds"} <= lines[0].keys()
    assert sum(line["loss"] for line in lines[-20:]) < 0.5 * sum(line["loss"] for line in lines[:20])


def test_only_the_newest_checkpoints_are_kept_and_nothing_partial(tmp_path):
    exported(tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != "tensorboard") == [
        "log.jsonl",
        "step_00000028.safetensors",
        "step_00000029.safetensors",
    ]


def test_an_unfinished_run_exports_its_averaged_weights(tmp_path):
    run(LineTask(recipe(tmp_path)), stop_at=10)
    task = LineTask(recipe(tmp_path))
    assert export_newest(task, tmp_path / "early.safetensors") == 10
    stored = load_file(str(max((tmp_path / "run").glob("step_*.safetensors"))))
    early = load_file(str(tmp_path / "early.safetensors"))
    assert same(early, {key: stored[f"average.model.{key}"] for key in early})
    assert not torch.equal(early["0.weight"], stored["module.model.0.weight"])


def test_accumulated_batches_give_the_mean_gradient(tmp_path):
    """Two batches of 8 in one step: as one batch of both, since the line's loss is a mean."""
    task = LineTask(recipe(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.0))
    batches = [task.dataset[0], task.dataset[1]]
    noises = [0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(step_seed(0, n))) for n in (0, 1)]
    x, y = torch.cat([b[0] + n for b, n in zip(batches, noises)]), torch.cat([b[1] for b in batches])
    expected = torch.autograd.grad((task.modules["model"](x)[:, 0] - y).square().mean(), list(task.modules["model"].parameters()))
    losses = _gradients(task, 0, batches)
    for parameter, gradient in zip(task.modules["model"].parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert losses["loss"].shape == ()


def test_pairs_are_logged_as_quotients_over_the_steps_between_two_lines(tmp_path):
    class Pairs(LineTask):
        def loss(self, step, batch, generator):
            return super().loss(step, batch, generator) | {"odd": torch.tensor([10.0 * step, 2.0]) if step % 2 else torch.zeros(2)}

    run(Pairs(recipe(tmp_path, num_steps=9, log_every=4)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line.get("odd") for line in lines] == [None, 10.0, 30.0]  # of step 0; 1 and 3; 5 and 7


def test_a_validation_sees_averaged_weights_and_changes_nothing(tmp_path):
    class Recorded:
        """Every tenth step; keeps the weights it saw."""

        at_start = False

        def __init__(self, task):
            self.task, self.seen = task, {}

        def due(self, step):
            return step % 10 == 9

        def __call__(self, step, ranks):
            self.seen[step] = {name: value.clone() for name, value in self.task.modules["model"].state_dict().items()}
            return {"psnr": 1.0 * step}, None

    task = LineTask(recipe(tmp_path / "a", num_checkpoints=40))
    validation = Recorded(task)
    run(task, validation=validation)
    assert list(validation.seen) == [9, 19, 29] and same(exported(tmp_path / "b"), load_file(str(tmp_path / "a" / "model.safetensors")))
    stored = load_file(str(tmp_path / "a" / "run" / "step_00000019.safetensors"))
    assert all(torch.equal(value, stored[f"average.model.{name}"]) for name, value in validation.seen[19].items())
    assert [json.loads(line) for line in (tmp_path / "a" / "run" / "validation.jsonl").read_text().splitlines()][1] == {"step": 19, "psnr": 19.0}


def test_a_checkpoint_older_than_a_field_resumes_with_its_default(tmp_path):
    run(LineTask(recipe(tmp_path)), stop_at=5)
    for path in (tmp_path / "run").glob("step_*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            tensors, state = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["mive.training"])
        del state["recipe"]["batches_a_step"], state["recipe"]["max_grad_norm"]
        save_file(tensors, str(path), {"mive.training": json.dumps(state)})
    run(LineTask(recipe(tmp_path)), stop_at=6)
    with pytest.raises(UserError, match="different batches_a_step"):
        run(LineTask(recipe(tmp_path, gradient_accumulation_steps=2)))


def test_step_seeds_differ():
    assert len({step_seed(seed, step) for seed in range(50) for step in range(50)}) == 2500


@pytest.mark.parametrize(
    "text, message",
    [
        ("task: vea\n", "unknown task"),
        ("- 1\n", "mapping"),
        ("task: [\n", "not YAML"),
        ("task: vae\nnum_step: 3\n", "unknown keys.*num_step"),
        ("task: vae\noutput_dir: a\nexport: b\n", "missing.*num_steps"),
        ("task: vae\noutput_dir: a\nexport: b\nnum_steps: many\n", "num_steps has the wrong type"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        train(path, TASKS)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        train(tmp_path / "none.yaml", TASKS)


def test_keys_as_they_were_called_before_are_taken_with_a_warning(tmp_path):
    """Recipes that people have keep working for one release, and so do their checkpoints."""
    old = dict(task="line", output_dir=str(tmp_path), export=str(tmp_path / "line.safetensors"), num_steps=4, ema=0.9, clip_norm=0.5)
    with pytest.warns(UserWarning, match="the key (ema|clip_norm) is now called (ema_decay|max_grad_norm)"):
        read = parse_recipe(Recipe, old)
    assert (read.ema_decay, read.max_grad_norm) == (0.9, 0.5)
    with pytest.raises(UserError, match="clip_norm and max_grad_norm, which are the same key"):
        parse_recipe(Recipe, old | {"max_grad_norm": 0.5})


def test_a_checkpoint_with_the_names_before_is_gone_on_from(tmp_path):
    whole = exported(tmp_path / "a")
    assert same(whole, exported(tmp_path / "b", stop_at=17, damage=with_old_names))


def with_old_names(folder: Path) -> None:
    """Every checkpoint as 0.1 wrote it."""
    for path in folder.glob("step_*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            state, tensors = json.loads(file.metadata()["mive.training"]), {key: file.get_tensor(key) for key in file.keys()}
        old = {new: name for name, new in RENAMED.items()}
        assert {"ema", "clip_norm"} <= {old.get(name, name) for name in state["recipe"]}
        state["recipe"] = {old.get(name, name): value for name, value in state["recipe"].items()}
        save_file(tensors, path, metadata={"mive.training": json.dumps(state)})
