"""Benchmarks the training steps of a recipe, without checkpoints: speed, and the share of time spent on loading data."""

import json
import math
import tempfile
from pathlib import Path

from ..embedded.tasks import TASKS
from ..train.loop import run
from ..train.tasks import read_task

NUM_WARMUP = 3  # steps before the measurement
SPEEDS = ("samples_per_second", "tokens_per_second", "mfu")


def bench_train(recipe_path: str | Path, num_steps: int = 30) -> dict:
    """Runs NUM_WARMUP + num_steps steps of a recipe in a temporary folder -> speeds, and the share of time not spent on loading data.

    Nothing is validated, kept or exported. Raises UserError in the same cases as `train`.
    """
    values = read_task(recipe_path, TASKS)
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "output_dir": str(folder),
            "export": str(Path(folder) / "none.safetensors"),
            "num_steps": NUM_WARMUP + num_steps + 1,
            "log_every": 1,
            "checkpoint_every_s": math.inf,
            "wandb": "",
            **({"validate_every": 0} if "validate_every" in values else {}),
        }
        task = TASKS[values["task"]](values | changes, recipe_path)
        run(task, stop_at=NUM_WARMUP + num_steps)
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()][NUM_WARMUP:]
    seconds = sum(line["seconds"] for line in lines)
    loading = sum(line["seconds"] * line["loading_share"] for line in lines) / seconds
    speeds = {name: sum(line[name] * line["seconds"] for line in lines) / seconds for name in SPEEDS if name in lines[0]}
    return {
        "recipe": str(recipe_path),
        "steps": len(lines),
        "seconds_a_step": seconds / len(lines),
        "loading_share": loading,
        "computing_share": 1 - loading,
        **speeds,
        "num_workers": task.recipe.num_workers,
        "device": task.recipe.device,
        "goal": {"computing_share": 0.95},
    }
