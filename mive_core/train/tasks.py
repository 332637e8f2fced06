"""`train(recipe)` builds the task that a recipe names and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .recipe import read_recipe

if TYPE_CHECKING:
    from .loop import Task

Build = Callable[[dict, object], "Task"]  # a recipe's values, where they stand -> the task


def build_edit(values: dict, where: object = None) -> Task:
    """The task `edit`: a DiT, or a LoRA on one, trained on cached pairs."""
    from .edit_task import build

    return build(values, where)


TASKS: Mapping[str, Build] = {"edit": build_edit}


def train(recipe_path: str | Path, tasks: Mapping[str, Build] = TASKS) -> None:
    """Trains the model that a YAML recipe describes; resumes where its output_dir holds a checkpoint.

    Under torchrun or `accelerate launch` each process trains on its share of every step's batches. `tasks` maps the names
    that a recipe's key `task` may have to the functions that build them. Raises UserError for a recipe that does not fit.
    """
    values = read_task(recipe_path, tasks)
    from .distributed import joined
    from .loop import run
    from .validate import validation_of

    with joined(values.get("device", "cpu")) as processes:
        task = tasks[values["task"]](values, recipe_path)
        run(task, processes=processes, validation=validation_of(task, recipe_path))


def read_task(recipe_path: str | Path, tasks: Mapping[str, Build] = TASKS) -> dict:
    """A recipe's values. Raises UserError where its task is not one of `tasks`."""
    values = read_recipe(recipe_path)
    if values["task"] not in tasks:
        raise UserError("unknown task", where=recipe_path, got=values["task"], expected=" or ".join(tasks))
    return values
