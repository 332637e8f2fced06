"""The figures of a run: a line of JSON each, and curves in TensorBoard and Weights & Biases."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import UserError
from ..media.paths import atomic_write
from .recipe import Recipe

FILES = {"train": "log.jsonl", "validation": "validation.jsonl"}
TENSORBOARD = "tensorboard"  # folder


class Log:
    """Appends to what an earlier run left, less the steps that are to be done again. Raises UserError where the system refuses a write."""

    def __init__(self, recipe: Recipe, first: int):
        """`first` is the step that the run begins with."""
        self.folder = Path(recipe.output_dir)
        for name in FILES.values():
            forget(self.folder / name, first)
        self.writers = [writer for writer in (tensorboard(self.folder / TENSORBOARD, first), weights_and_biases(recipe)) if writer is not None]

    def write(self, step: int, figures: Mapping[str, float], kind: str = "train", picture: Path | None = None) -> None:
        """`kind` is one of FILES; `picture` a PNG that belongs to the figures."""
        with writing(self.folder):
            with open(self.folder / FILES[kind], "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            for writer in self.writers:
                writer.write(step, {f"{kind}/{name}": value for name, value in figures.items()}, kind, picture)

    def close(self) -> None:
        with writing(self.folder):
            for writer in self.writers:
                writer.close()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"could not be written ({error.strerror or error})", where=folder, fix="check space and permissions; the run goes on from its last checkpoint"
        ) from error


def forget(path: Path, first: int) -> None:
    """Takes the lines of steps from `first` on out of a file, and one that was cut short."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first]
    if kept != lines:
        with atomic_write(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


class TensorBoard:
    def __init__(self, folder: Path, first: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, figures: Mapping[str, float], kind: str, picture: Path | None) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        if picture is not None:
            self.writer.add_image(f"{kind}/sheet", pixels(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, recipe: Recipe):
        import wandb

        folder = Path(recipe.output_dir)
        # one run for one output_dir, however often it is resumed
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.image, self.run = wandb.Image, wandb.init(project=recipe.wandb, id=name, name=folder.name, dir=str(folder), config=asdict(recipe), resume="allow")

    def write(self, step: int, figures: Mapping[str, float], kind: str, picture: Path | None) -> None:
        self.run.log({**figures, **({f"{kind}/sheet": self.image(str(picture))} if picture is not None else {}), "step": step})

    def close(self) -> None:
        self.run.finish()


def tensorboard(folder: Path, first: int) -> TensorBoard | None:
    """None where the package is missing: the lines of JSON hold the same figures."""
    try:
        return TensorBoard(folder, first)
    except ImportError:
        return None


def weights_and_biases(recipe: Recipe) -> WeightsAndBiases | None:
    """None where the recipe names no project. Raises UserError where the package is missing."""
    if not recipe.wandb:
        return None
    try:
        return WeightsAndBiases(recipe)
    except ImportError as error:
        raise UserError("the recipe's wandb needs the package wandb", got=str(error), fix="pip install wandb, or leave it out") from None


def pixels(path: Path):
    """A picture's (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
