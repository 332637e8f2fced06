"""Entry point of the trainer: `train` builds the task that a recipe names and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .recipe import read_recipe

if TYPE_CHECKING:
    from .loop import Task

TaskBuilder = Callable[[dict, object], "Task"]  # (recipe values, recipe path for messages) -> task


def build_edit(values: dict, where: object = None) -> Task:
    """Builds the task `edit`: a DiT, or a LoRA on one, trained on cached pairs."""
    from .edit_task import build

    return build(values, where)


def build_distill(values: dict, where: object = None) -> Task:
    """Builds the task `distill`: a LoRA with which a DiT takes few steps without guidance."""
    from .distill import build

    return build(values, where)


TASKS: Mapping[str, TaskBuilder] = {"edit": build_edit, "distill": build_distill}


def train(recipe_path: str | Path, tasks: Mapping[str, TaskBuilder] = TASKS) -> None:
    """Trains the model that a YAML recipe describes; resumes from a checkpoint in its output_dir.

    Under torchrun or `accelerate launch` the processes split the batches of each step. `tasks` maps values of the recipe key `task`
    to the functions that build them. Raises UserError for an invalid recipe.
    """
    values = read_task(recipe_path, tasks)
    from .launcher import process_group
    from .loop import run
    from .validate import build_validation

    with process_group(values.get("device", "cpu")) as processes:
        task = tasks[values["task"]](values, recipe_path)
        run(task, processes=processes, validation=build_validation(task, recipe_path))


def read_task(recipe_path: str | Path, tasks: Mapping[str, TaskBuilder] = TASKS) -> dict:
    """Reads the values of a recipe. Raises UserError if its task is not one of `tasks`."""
    values = read_recipe(recipe_path)
    if values["task"] not in tasks:
        raise UserError("unknown task", where=recipe_path, got=values["task"], expected=" or ".join(tasks))
    return values
