"""`train(recipe)`: the task that a recipe names, built and run. What the archive of the pack leaves out; a host builds its task itself."""

import json
import math
import tempfile
from importlib import import_module
from pathlib import Path

from ..errors import UserError
from .recipe import read_recipe

TASKS = ("vae", "vlm", "dit", "edit")
WARM = 3  # steps before a measurement
SPEEDS = ("samples_per_second", "tokens_per_second", "mfu")


def train(recipe_path: str | Path) -> None:
    """Trains the model that a YAML recipe describes; resumes where its output_dir holds a checkpoint.

    Under torchrun or `accelerate launch` each process trains on its share of every step's batches. Each task's module has `build(values: dict, where) -> Task`. Raises UserError for a recipe that does not fit.
    """
    values = known_task(recipe_path)
    from .loop import run
    from .ranks import joined
    from .validate import validation_of

    with joined(values.get("device", "cpu")) as ranks:
        task = build(values, recipe_path)
        run(task, ranks=ranks, validation=validation_of(task, recipe_path))


def known_task(recipe_path: str | Path) -> dict:
    """A recipe's values. Raises UserError where its task is unknown."""
    values = read_recipe(recipe_path)
    if values["task"] not in TASKS:
        raise UserError("unknown task", where=recipe_path, got=values["task"], expected=" or ".join(TASKS))
    return values


def build(values: dict, where: object = None):
    """The task of a recipe's values."""
    return import_module(f".{values['task']}", __package__).build(values, where=where)


def bench_train(recipe_path: str | Path, num_steps: int = 30) -> dict:
    """Steps of a recipe in a folder that is thrown away, after WARM others: the meter's figures, and what share of the time was not loading.

    Nothing is validated, written or exported. Raises UserError as `train` does.
    """
    values = known_task(recipe_path)
    from .loop import run

    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": str(folder), "export": str(Path(folder) / "none.safetensors"), "num_steps": WARM + num_steps + 1, "log_every": 1,
                   "checkpoint_every_s": math.inf, "wandb": "", **({"validate_every": 0} if "validate_every" in values else {})}
        task = build(values | changes, recipe_path)
        run(task, stop_at=WARM + num_steps)
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()][WARM:]
    seconds = sum(line["seconds"] for line in lines)
    loading = sum(line["seconds"] * line["loading_share"] for line in lines) / seconds
    speeds = {name: sum(line[name] * line["seconds"] for line in lines) / seconds for name in SPEEDS if name in lines[0]}
    return {"recipe": str(recipe_path), "steps": len(lines), "seconds_a_step": seconds / len(lines), "loading_share": loading, "computing_share": 1 - loading,
            **speeds, "num_workers": task.recipe.num_workers, "device": task.recipe.device, "goal": {"computing_share": 0.95}}
