"""`train(recipe)`: the task that a recipe names, built and run. What the archive of the pack leaves out; a host builds its task itself."""

from importlib import import_module
from pathlib import Path

from ..errors import UserError
from .recipe import read_recipe

TASKS = ("vae", "vlm", "dit", "edit")


def train(recipe_path: str | Path) -> None:
    """Trains the model that a YAML recipe describes; resumes where its output_dir holds a checkpoint.

    Under torchrun or `accelerate launch` each process trains on its share of every step's batches. Each task's module has `build(values: dict, where) -> Task`. Raises UserError for a recipe that does not fit.
    """
    values = read_recipe(recipe_path)
    if values["task"] not in TASKS:
        raise UserError("unknown task", where=recipe_path, got=values["task"], expected=" or ".join(TASKS))
    from .loop import run
    from .ranks import joined
    from .validate import validation_of

    with joined(values.get("device", "cpu")) as ranks:
        task = import_module(f".{values['task']}", __package__).build(values, where=recipe_path)
        run(task, ranks=ranks, validation=validation_of(task, recipe_path))
