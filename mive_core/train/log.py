"""The metrics log of a run: JSON lines, and curves in TensorBoard and Weights & Biases."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..media.paths import atomic_write
from .recipe import Recipe

FILES = {"train": "log.jsonl", "validation": "validation.jsonl"}
TENSORBOARD = "tensorboard"  # folder in output_dir


class Log:
    """Appends to the log of an earlier run, without the steps that will be repeated. Raises UserError if a file cannot be written."""

    def __init__(self, recipe: Recipe, first_step: int):
        """`first_step` is the first step of this run."""
        self.folder = Path(recipe.output_dir)
        for name in FILES.values():
            drop_steps_from(self.folder / name, first_step)
        self.writers = [writer for writer in (tensorboard(self.folder / TENSORBOARD, first_step), weights_and_biases(recipe)) if writer is not None]

    def write(self, step: int, metrics: Mapping[str, float], kind: str = "train", image: Path | None = None) -> None:
        """`kind` is a key of FILES; `image` is a PNG that illustrates the metrics. JSON has no NaN: values that are not finite become null."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with write_errors(self.folder):
            with open(self.folder / FILES[kind], "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **{name: finite.get(name) for name in metrics}}, allow_nan=False) + "\n")
            for writer in self.writers:
                writer.write(step, {f"{kind}/{name}": value for name, value in finite.items()}, kind, image)

    def close(self) -> None:
        with write_errors(self.folder):
            for writer in self.writers:
                writer.close()


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Context manager that turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not be written ({error.strerror or error})", where=folder, fix="check space and permissions; the run goes on from its last checkpoint"
        ) from error


def drop_steps_from(path: Path, first_step: int) -> None:
    """Removes lines of steps from `first_step` on, and an incomplete last line, from a log file."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
    if kept != lines:
        with atomic_write(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


class TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, step: int, metrics: Mapping[str, float], kind: str, image: Path | None) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        if image is not None:
            self.writer.add_image(f"{kind}/sheet", pixels(image), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, recipe: Recipe):
        import wandb

        folder = Path(recipe.output_dir)
        # one Weights & Biases run per output_dir, also across resumes
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.image, self.run = wandb.Image, wandb.init(project=recipe.wandb, id=name, name=folder.name, dir=str(folder), config=asdict(recipe), resume="allow")

    def write(self, step: int, metrics: Mapping[str, float], kind: str, image: Path | None) -> None:
        self.run.log({**metrics, **({f"{kind}/sheet": self.image(str(image))} if image is not None else {}), "step": step})

    def close(self) -> None:
        self.run.finish()


def tensorboard(folder: Path, first_step: int) -> TensorBoard | None:
    """Returns None if the package is missing: the JSON lines hold the same metrics."""
    try:
        return TensorBoard(folder, first_step)
    except ImportError:
        return None


def weights_and_biases(recipe: Recipe) -> WeightsAndBiases | None:
    """Returns None if the recipe names no project. Raises UserError if the package is missing."""
    if not recipe.wandb:
        return None
    try:
        return WeightsAndBiases(recipe)
    except ImportError as error:
        raise UserError("the recipe's wandb needs the package wandb", got=str(error), fix="pip install wandb, or leave it out") from None


def pixels(path: Path):
    """Reads an image file as (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
