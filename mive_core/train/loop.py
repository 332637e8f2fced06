"""The training loop of all embedded models.

A task says what is trained, on what, and by which loss; the loop owns order, checkpoints and logs.
Whatever is random derives from (seed, step), so a resumed run continues bit for bit.
"""

import json
import time
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import state
from .recipe import Recipe, defaults_of, fingerprint


class Task(Protocol):
    """What a model brings to the loop."""

    recipe: Recipe
    modules: Mapping[str, nn.Module]  # trained, averaged and checkpointed
    optimizers: Mapping[str, torch.optim.Optimizer]
    dataset: Dataset  # dataset[n] is the n-th batch, a function of (seed, n) alone; a step takes recipe.num_accumulated of them

    def rate(self, step: int) -> float:
        """Factor on every optimizer's learning rate at this step, 0..1."""

    def loss(self, step: int, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars, among them 'loss'. Draw noise from the generator only: it is seeded by (seed, number of the batch)."""

    def after_step(self, step: int) -> None:
        """Called after the optimizers' step, for instance to bound norms."""

    def export(self, path: Path) -> None:
        """Writes the finished model. The modules then hold the averaged weights, where `ema` is set."""


def run(task: Task, *, stop_at: int | None = None) -> None:
    """Trains from the newest checkpoint in `output_dir`, or from step 0, and exports at the end.

    `stop_at` ends the run before that step, without a checkpoint, as a crash would.
    """
    recipe = task.recipe
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    averages = {name: value.detach().clone() for name, value in _weights(task)} if recipe.ema else {}
    plan = fingerprint(recipe)
    first = state.restore(folder, task.modules, averages, task.optimizers, plan, defaults_of(recipe))
    groups = [group for optimizer in task.optimizers.values() for group in optimizer.param_groups]
    base_rates = [group["lr"] for group in groups]
    last = recipe.num_steps if stop_at is None else min(stop_at, recipe.num_steps)
    saved_at = time.monotonic()
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        for step, batches in _progress(recipe, _batches(task, first, last), first):
            started = time.monotonic()
            for group, base_rate in zip(groups, base_rates):
                group["lr"] = base_rate * task.rate(step)
            losses = _step(task, step, batches)
            _average(task, averages, step)
            if step % recipe.log_every == 0:
                line = {"step": step} | {name: float(value.detach()) for name, value in losses.items()}
                log.write(json.dumps(line | {"seconds": round(time.monotonic() - started, 4)}) + "\n")
                log.flush()
            if time.monotonic() - saved_at > recipe.checkpoint_every_s or step == recipe.num_steps - 1:
                state.save(folder, step, task.modules, averages, task.optimizers, plan, recipe.num_checkpoints)
                saved_at = time.monotonic()
    if last == recipe.num_steps:
        _use(task, averages)
        task.export(Path(recipe.export))


def export_newest(task: Task, path: Path) -> int:
    """Exports the newest checkpoint of an unfinished run; returns the number of steps it has done."""
    averages = {name: value.detach().clone() for name, value in _weights(task)} if task.recipe.ema else {}
    num_steps = state.restore(Path(task.recipe.output_dir), task.modules, averages, task.optimizers,
                              fingerprint(task.recipe), defaults_of(task.recipe))
    _use(task, averages)
    task.export(path)
    return num_steps


def step_seed(seed: int, step: int) -> int:
    """One seed for each (seed, step), below 2**63."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


def _step(task: Task, step: int, batches: list) -> dict[str, Tensor]:
    """One optimizer step on the mean gradient of the batches -> their mean losses."""
    recipe, first = task.recipe, step * len(batches)
    for optimizer in task.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    means: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, first):
        generator = torch.Generator().manual_seed(step_seed(recipe.seed, number))
        with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bf16):
            losses = task.loss(step, batch, generator)
        (losses["loss"] / len(batches)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(batches)
    if recipe.clip_norm:
        parameters = [p for module in task.modules.values() for p in module.parameters()]
        means["grad_norm"] = nn.utils.clip_grad_norm_(parameters, recipe.clip_norm)
    for optimizer in task.optimizers.values():
        optimizer.step()
    task.after_step(step)
    return means


def _batches(task: Task, first: int, last: int) -> Iterator[tuple[int, list]]:
    """(step, its batches)."""
    count = task.recipe.num_accumulated
    loader = iter(DataLoader(task.dataset, batch_size=None, sampler=range(first * count, last * count), num_workers=task.recipe.num_workers))
    return ((step, [next(loader) for _ in range(count)]) for step in range(first, last))


def _progress(recipe: Recipe, batches: Iterator, first: int) -> Iterator:
    return tqdm(batches, desc=f"train {recipe.task}", initial=first, total=recipe.num_steps, unit="step", mininterval=5.0)


def _weights(task: Task) -> Iterator[tuple[str, Tensor]]:
    for name, module in task.modules.items():
        for key, parameter in module.named_parameters():
            yield f"{name}.{key}", parameter


@torch.no_grad()
def _average(task: Task, averages: dict[str, Tensor], step: int) -> None:
    """Exponential moving average whose window opens with the run, so that it never remembers the initial weights."""
    decay = min(task.recipe.ema, (1 + step) / (10 + step))
    for name, parameter in _weights(task) if averages else ():
        averages[name].lerp_(parameter, 1 - decay)


@torch.no_grad()
def _use(task: Task, averages: dict[str, Tensor]) -> None:
    for name, parameter in _weights(task) if averages else ():
        parameter.copy_(averages[name])
