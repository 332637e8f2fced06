"""The training loop of all embedded models.

A task says what is trained, on what, and by which loss; the loop owns order, checkpoints and logs.
Whatever is random derives from (seed, step), so a resumed run continues bit for bit.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import checkpoints
from .distributed import ProcessGroup, whole
from .log import Log
from .recipe import Recipe, defaults_of, fingerprint
from .throughput import ThroughputMeter, Work, peak_flops


class Task:
    """What a model brings to the loop."""

    recipe: Recipe
    modules: Mapping[str, nn.Module]  # trained, averaged and checkpointed
    optimizers: Mapping[str, torch.optim.Optimizer]
    dataset: Dataset  # dataset[n] is the n-th batch, a function of (seed, n) alone; a step takes recipe.gradient_accumulation_steps of them

    def rate(self, step: int) -> float:
        """Factor on every optimizer's learning rate at this step, 0..1."""
        raise NotImplementedError

    def loss(self, step: int, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars, among them 'loss', and pairs (2,) of a sum and its weight, which are logged as quotients over the steps between two lines.

        Draw noise from the generator only: it is seeded by (seed, number of the batch).
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after the optimizers' step, for instance to bound norms."""

    def work(self, batch: Any) -> Work | None:
        """What the batch amounts to, where it is to be measured."""

    def export(self, path: Path) -> None:
        """Writes the finished model. The modules then hold the averaged weights, where `ema_decay` is set.

        Called by the first process, and by all of them where weights are sharded: then the first one is to write.
        """
        raise NotImplementedError


class Validation(Protocol):
    """Measures the model between steps; all processes call it."""

    def due(self, step: int) -> bool: ...

    def __call__(self, step: int, processes: ProcessGroup) -> tuple[dict[str, float], Path]:
        """Figures, and a picture of them that the first process wrote."""


def run(
    task: Task,
    *,
    stop_at: int | None = None,
    processes: ProcessGroup = ProcessGroup(),
    watch: Callable[[int, dict[str, Tensor]], None] | None = None,
    validation: Validation | None = None,
) -> None:
    """Trains from the newest checkpoint in `output_dir`, or from step 0, and exports at the end.

    `stop_at` ends the run before that step, without a checkpoint, as a crash would. Of several processes the first one writes.
    `watch` is told each step that is done and its losses; what it raises ends the run after a checkpoint, where a later run goes on.
    `validation` sees the averaged weights, where there are, after a checkpoint.
    """
    recipe = task.recipe
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    averages = _copies(task)
    plan = plan_of(recipe, processes)
    first = checkpoints.restore(folder, task.modules, averages, task.optimizers, plan, _defaults(recipe), recipe.free_fields)
    processes.wait()  # until all have read, before one writes
    rates = [(group, float(group["lr"])) for optimizer in task.optimizers.values() for group in optimizer.param_groups]
    last = recipe.num_steps if stop_at is None else min(stop_at, recipe.num_steps)
    saved_at = time.monotonic()
    batches, sums = _batches(task, first, last, processes), {}
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(recipe, first))) if processes.is_first else None
        meter = ThroughputMeter(peak_flops(recipe.device, recipe.peak_tflops), processes.size)
        for step in _progress(recipe, first, last, processes):
            with meter.waiting():
                own = next(batches)
            for group, base_rate in rates:
                _set_rate(group, base_rate * task.rate(step))
            losses = _step(task, step, own, processes)
            _average(task, averages, step)
            meter.count(task.work(batch) for batch in own)
            sums = {name: sums.get(name, 0) + pair for name, pair in losses.items() if pair.ndim}
            losses = {name: value for name, value in losses.items() if not value.ndim}
            if step % recipe.log_every == 0:
                figures = {name: float(value) for name, value in losses.items()} | _quotients(sums)  # waits for the device
                figures |= meter.read()
                sums = {}
                if log is not None:
                    log.write(step, figures)
            stopped = _stopped(watch, step, losses)
            due = validation is not None and validation.due(step)
            if stopped or due or step == recipe.num_steps - 1 or processes.agree(time.monotonic() - saved_at > recipe.checkpoint_every_s):
                checkpoints.save(folder, step, task.modules, averages, task.optimizers, plan, recipe.num_checkpoints, processes)
                saved_at = time.monotonic()
            if stopped:
                raise stopped
            if due:
                with _averaged(task, averages):
                    figures, picture = validation(step, processes)
                if log is not None:
                    log.write(step, figures, "validation", picture)
                meter.restart()
    if last == recipe.num_steps:
        _exchange(task, averages)
        if processes.is_first or _is_sharded(task):
            task.export(Path(recipe.export))


def plan_of(recipe: Recipe, processes: ProcessGroup) -> dict:
    """What a checkpoint depends on: the recipe, and how many batches make a step, however they are shared out."""
    return fingerprint(recipe) | {"batches_a_step": recipe.gradient_accumulation_steps * processes.size}


def export_newest(task: Task, path: Path) -> int:
    """Exports the newest checkpoint of an unfinished run; returns the number of steps it has done."""
    averages = _copies(task)
    recipe = task.recipe
    num_steps = checkpoints.restore(
        Path(recipe.output_dir), task.modules, averages, task.optimizers, plan_of(recipe, ProcessGroup()), _defaults(recipe), recipe.free_fields
    )
    _exchange(task, averages)
    task.export(path)
    return num_steps


def step_seed(seed: int, step: int) -> int:
    """One seed for each (seed, step), below 2**63."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


def _step(task: Task, step: int, batches: list, processes: ProcessGroup = ProcessGroup()) -> dict[str, Tensor]:
    """One optimizer step on the mean gradient of all processes' batches -> their mean losses."""
    recipe = task.recipe
    parameters = [p for module in task.modules.values() for p in module.parameters()]
    for optimizer in task.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    means: dict[str, Tensor] = {}
    for number, batch in zip(processes.batches_of(step, len(batches)), batches):
        generator = torch.Generator().manual_seed(step_seed(recipe.seed, number))
        with torch.autocast(torch.device(recipe.device).type, torch.bfloat16, enabled=recipe.bf16):
            losses = task.loss(step, batch, generator)
        (losses["loss"] / len(batches)).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() / len(batches)
    processes.average_([p.grad for p in parameters if p.grad is not None])
    processes.average_(list(means.values()))
    if recipe.max_grad_norm:
        means["grad_norm"] = whole(nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm))
    for optimizer in task.optimizers.values():
        optimizer.step()
    task.after_step(step)
    return means


def _stopped(watch: Callable[[int, dict[str, Tensor]], None] | None, step: int, losses: dict[str, Tensor]) -> BaseException | None:
    """What `watch` raises at this step."""
    try:
        if watch is not None:
            watch(step, losses)
    except BaseException as error:  # a host's interruption need not be an Exception
        return error
    return None


def _batches(task: Task, first: int, last: int, processes: ProcessGroup) -> Iterator[list]:
    """This process's batches of each step."""
    count = task.recipe.gradient_accumulation_steps
    numbers = [number for step in range(first, last) for number in processes.batches_of(step, count)]
    loader = iter(DataLoader(task.dataset, batch_size=None, sampler=numbers, num_workers=task.recipe.num_workers))
    return ([next(loader) for _ in range(count)] for _ in range(first, last))


def _progress(recipe: Recipe, first: int, last: int, processes: ProcessGroup) -> Iterator[int]:
    return tqdm(
        range(first, last), desc=f"train {recipe.task}", initial=first, total=recipe.num_steps, unit="step", mininterval=5.0, disable=not processes.is_first
    )


def _set_rate(group: dict, rate: float) -> None:
    """In place where it is a tensor, which compiled optimizers read."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _quotients(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Pairs of a sum and its weight -> their quotient, where anything was weighed."""
    read = {name: pair.tolist() for name, pair in sums.items()}
    return {name: total / weight for name, (total, weight) in read.items() if weight}


def _defaults(recipe: Recipe) -> dict:
    return defaults_of(recipe) | {"batches_a_step": 1}


def _is_sharded(task: Task) -> bool:
    return any(isinstance(value, DTensor) for _, value in _weights(task))


def _copies(task: Task) -> dict[str, Tensor]:
    """Where the averaged weights are kept."""
    return {name: value.detach().clone() for name, value in _weights(task)} if task.recipe.ema_decay else {}


def _weights(task: Task) -> Iterator[tuple[str, Tensor]]:
    for name, module in task.modules.items():
        for key, parameter in module.named_parameters():
            yield f"{name}.{key}", parameter


@torch.no_grad()
def _average(task: Task, averages: dict[str, Tensor], step: int) -> None:
    """Exponential moving average whose window opens with the run, so that it never remembers the initial weights."""
    decay = min(task.recipe.ema_decay, (1 + step) / (10 + step))
    for name, parameter in _weights(task) if averages else ():
        averages[name].lerp_(parameter, 1 - decay)


@contextmanager
def _averaged(task: Task, averages: dict[str, Tensor]) -> Iterator[None]:
    """The modules hold the averaged weights, and then their own again."""
    _exchange(task, averages)
    try:
        yield
    finally:
        _exchange(task, averages)


@torch.no_grad()
def _exchange(task: Task, averages: dict[str, Tensor]) -> None:
    for name, parameter in _weights(task) if averages else ():
        own = parameter.clone()
        parameter.copy_(averages[name])
        averages[name].copy_(own)
