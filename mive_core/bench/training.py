"""Steps of a recipe, without checkpoints: speed, and the share of time that goes on loading."""

import json
import math
import tempfile
from pathlib import Path

from ..embedded.tasks import TASKS
from ..train.loop import run
from ..train.tasks import read_task

NUM_WARMUP = 3  # steps before a measurement
SPEEDS = ("samples_per_second", "tokens_per_second", "mfu")


def bench_train(recipe_path: str | Path, num_steps: int = 30) -> dict:
    """Runs steps of a recipe in a temporary folder, after NUM_WARMUP others -> speeds, and the share of the time that was not loading.

    Nothing is validated, written or exported. Raises UserError as `train` does.
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
