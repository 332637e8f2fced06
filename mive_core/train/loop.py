"""The training loop of all models.

A task defines the model, the data and the loss; the loop handles the order of steps, checkpoints and logs.
All randomness derives from (seed, step), so a resumed run continues bit for bit.
"""

import math
import time
import warnings
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
from .distributed import ProcessGroup, full_tensor
from .finite import StepGuard, all_finite, check_weights
from .log import Log
from .recipe import Recipe, defaults_of, fingerprint
from .throughput import ThroughputMeter, Workload, peak_flops


class Task:
    """Base class of tasks: what the loop needs to train a model."""

    recipe: Recipe
    modules: Mapping[str, nn.Module]  # modules whose weights are trained, averaged and checkpointed
    optimizers: Mapping[str, torch.optim.Optimizer]
    dataset: Dataset  # dataset[n] is the n-th batch, a function of (seed, n) alone; a step takes recipe.gradient_accumulation_steps of them

    def lr_factor(self, step: int) -> float:
        """Returns the factor on all learning rates at this step, 0..1."""
        raise NotImplementedError

    def loss(self, step: int, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns scalars, among them 'loss', and pairs (2,) of a sum and its weight, logged as weighted means over the steps between two log lines.

        All noise must come from the generator, which is seeded by (seed, index of the batch).
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Hook after the optimizers' step, for instance to bound norms."""

    def workload(self, batch: Any) -> Workload | None:
        """Returns the amount of work in the batch; None: throughput is not measured."""

    def export(self, path: Path) -> None:
        """Writes the finished model. If `ema_decay` is set, the modules hold the averaged weights during this call.

        Only the first process calls it; if weights are sharded, all processes call it and the first one writes.
        """
        raise NotImplementedError


class Validation(Protocol):
    """Measures the model between steps; called by all processes."""

    @property
    def at_start(self) -> bool: ...

    def due(self, step: int) -> bool:
        """Returns whether to validate after this step."""

    def __call__(self, step: int, processes: ProcessGroup) -> tuple[dict[str, float], Path]:
        """Returns metrics, and the path of an image that the first process wrote."""


def run(
    task: Task,
    *,
    stop_at: int | None = None,
    processes: ProcessGroup = ProcessGroup(),
    on_step_end: Callable[[int, dict[str, Tensor]], None] | None = None,
    validation: Validation | None = None,
) -> None:
    """Trains from the newest checkpoint in `output_dir`, or from step 0, and exports at the end. Only the first process writes.

    A resumed run whose learning rates, schedule or number of steps were changed says so in a warning and in its checkpoints.

    `stop_at` ends the run before that step without a checkpoint, as a crash would. `on_step_end` is called after each step with the
    step and its losses; an exception from it ends the run after a checkpoint, from which a later run resumes. `validation` runs after
    a checkpoint, on the averaged weights if `ema_decay` is set. Steps that are not finite are skipped, see finite.py: weights and averages
    stay as they are, and no checkpoint is due until a step is taken again. Raises UserError if several in a row are not finite.
    """
    recipe = task.recipe
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.num_threads:
        torch.set_num_threads(recipe.num_threads)
    averages = _initial_averages(task)
    recipe_fields = checkpoint_fields(recipe, processes)
    resumed = _restore(task, averages, recipe_fields)
    first = resumed.step
    if resumed.newest and processes.is_first:
        shown = ", ".join(f"{name} from {old} to {new}" for name, (old, new) in resumed.newest.items())
        warnings.warn(f"{folder}: the run goes on from step {first + 1} with a change of {shown}", stacklevel=2)
    processes.barrier()  # all processes have read before the first one writes
    base_lrs = [(group, float(group["lr"])) for optimizer in task.optimizers.values() for group in optimizer.param_groups]
    last = recipe.num_steps if stop_at is None else min(stop_at, recipe.num_steps)
    saved_at = time.monotonic()
    batches = _batches(task, first, last, processes)
    sums: dict[str, Tensor] = {}
    guard = StepGuard(first, processes.is_first)
    with ExitStack() as stack:
        log = stack.enter_context(closing(Log(recipe, first))) if processes.is_first else None
        if validation is not None and validation.at_start and first == 0:
            _validate(task, averages, validation, -1, processes, log)
        meter = ThroughputMeter(peak_flops(recipe.device, recipe.peak_tflops), processes.size)
        for step in _progress(recipe, first, last, processes):
            with meter.waiting():
                step_batches = next(batches)
            for group, base_lr in base_lrs:
                _set_lr(group, base_lr * task.lr_factor(step))
            losses = _gradients(task, step, step_batches, processes)
            if is_taken := guard.accepts(step, losses):
                for optimizer in task.optimizers.values():
                    optimizer.step()
                task.after_step(step)
                _update_averages(task, averages, step)
                sums = {name: sums.get(name, 0) + pair for name, pair in losses.items() if pair.ndim}
            meter.count(task.workload(batch) for batch in step_batches)
            losses = {name: value for name, value in losses.items() if not value.ndim}
            if step % recipe.log_every == 0 or guard.ends_run:
                metrics = {name: float(value) for name, value in losses.items()} | _quotients(sums)  # synchronises with the device
                metrics |= {**guard.logged(), **meter.read()}
                sums = {}
                if log is not None:
                    log.write(step, metrics)
            interruption = _interruption(on_step_end, step, losses)
            if interruption is None:
                guard.check(step, last - 1)
            due = validation is not None and validation.due(step)
            is_time = processes.broadcast(time.monotonic() - saved_at > recipe.checkpoint_every_s) and is_taken
            if interruption or due or step == recipe.num_steps - 1 or is_time:
                if interruption is None:
                    check_weights(_saved(task, averages), step, processes)
                if interruption is None or all_finite(_saved(task, averages), processes):
                    checkpoints.save(folder, step, task.modules, averages, task.optimizers, recipe_fields, recipe.num_checkpoints, processes, resumed.changes)
                saved_at = time.monotonic()
            if interruption:
                raise interruption
            if validation is not None and due:
                _validate(task, averages, validation, step, processes, log)
                meter.restart()
    if last == recipe.num_steps:
        check_weights(_saved(task, averages), recipe.num_steps - 1, processes)
        _swap_averages(task, averages)
        if processes.is_first or _is_sharded(task):
            task.export(Path(recipe.export))


def _validate(task: Task, averages: dict[str, Tensor], validation: Validation, step: int, processes: ProcessGroup, log: Log | None) -> None:
    """Validates with the averaged weights; the first process logs the metrics."""
    with _averaged_weights(task, averages):
        metrics, image = validation(step, processes)
    if log is not None:
        log.write(step, metrics, "validation", image)


def checkpoint_fields(recipe: Recipe, processes: ProcessGroup) -> dict:
    """Returns what must match to resume a checkpoint: recipe fields, and batches per step, however they are split over processes."""
    return fingerprint(recipe) | {"batches_a_step": recipe.gradient_accumulation_steps * processes.size}


def export_newest(task: Task, path: Path) -> int:
    """Exports the newest checkpoint of an unfinished run; returns its number of finished steps."""
    averages = _initial_averages(task)
    num_steps = _restore(task, averages, checkpoint_fields(task.recipe, ProcessGroup())).step
    check_weights(_saved(task, averages), num_steps - 1)
    _swap_averages(task, averages)
    task.export(path)
    return num_steps


def _restore(task: Task, averages: dict[str, Tensor], recipe_fields: dict) -> checkpoints.Resumed:
    recipe = task.recipe
    return checkpoints.restore(
        Path(recipe.output_dir), task.modules, averages, task.optimizers, recipe_fields, _defaults(recipe), recipe.free_fields, recipe.is_adjustable
    )


def step_seed(seed: int, step: int) -> int:
    """Returns a seed below 2**63 for each pair (seed, step)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % (1 << 63)


def _gradients(task: Task, step: int, batches: list, processes: ProcessGroup = ProcessGroup()) -> dict[str, Tensor]:
    """Computes the mean gradient of all processes' batches, clipped to `max_grad_norm`; returns their mean losses and `grad_norm` before that."""
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
    means["grad_norm"] = full_tensor(nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf))
    return means


def _interruption(on_step_end: Callable[[int, dict[str, Tensor]], None] | None, step: int, losses: dict[str, Tensor]) -> BaseException | None:
    """Calls `on_step_end` and returns the exception that it raises, if any."""
    try:
        if on_step_end is not None:
            on_step_end(step, losses)
    except BaseException as error:  # the interruption of a host application may not be an Exception
        return error
    return None


def _batches(task: Task, first: int, last: int, processes: ProcessGroup) -> Iterator[list]:
    """Yields the list of this process's batches for each step."""
    count = task.recipe.gradient_accumulation_steps
    numbers = [number for step in range(first, last) for number in processes.batches_of(step, count)]
    loader = iter(DataLoader(task.dataset, batch_size=None, sampler=numbers, num_workers=task.recipe.num_workers))
    return ([next(loader) for _ in range(count)] for _ in range(first, last))


def _progress(recipe: Recipe, first: int, last: int, processes: ProcessGroup) -> Iterator[int]:
    return tqdm(
        range(first, last), desc=f"train {recipe.task}", initial=first, total=recipe.num_steps, unit="step", mininterval=5.0, disable=not processes.is_first
    )


def _set_lr(group: dict, lr: float) -> None:
    """Sets a learning rate; tensors are set in place, since compiled optimizers read them."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _quotients(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Pairs of a sum and its weight -> weighted means; pairs of weight 0 are left out."""
    read = {name: pair.tolist() for name, pair in sums.items()}
    return {name: total / weight for name, (total, weight) in read.items() if weight}


def _defaults(recipe: Recipe) -> dict:
    return defaults_of(recipe) | {"batches_a_step": 1}


def _is_sharded(task: Task) -> bool:
    return any(isinstance(value, DTensor) for _, value in _weights(task))


def _initial_averages(task: Task) -> dict[str, Tensor]:
    """Returns copies of the weights to hold their moving average; {} without `ema_decay`."""
    return {name: value.detach().clone() for name, value in _weights(task)} if task.recipe.ema_decay else {}


def _saved(task: Task, averages: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yields the weights and averages that a checkpoint holds."""
    yield from (parameter for _, parameter in _weights(task))
    yield from averages.values()


def _weights(task: Task) -> Iterator[tuple[str, Tensor]]:
    for name, module in task.modules.items():
        for key, parameter in module.named_parameters():
            yield f"{name}.{key}", parameter


@torch.no_grad()
def _update_averages(task: Task, averages: dict[str, Tensor], step: int) -> None:
    """Updates the exponential moving average; its decay grows from 0.1 to `ema_decay`, so that the initial weights are soon forgotten."""
    decay = min(task.recipe.ema_decay, (1 + step) / (10 + step))
    for name, parameter in _weights(task) if averages else ():
        averages[name].lerp_(parameter, 1 - decay)


@contextmanager
def _averaged_weights(task: Task, averages: dict[str, Tensor]) -> Iterator[None]:
    """Context manager in which the modules hold the averaged weights."""
    _swap_averages(task, averages)
    try:
        yield
    finally:
        _swap_averages(task, averages)


@torch.no_grad()
def _swap_averages(task: Task, averages: dict[str, Tensor]) -> None:
    for name, parameter in _weights(task) if averages else ():
        own = parameter.clone()
        parameter.copy_(averages[name])
        averages[name].copy_(own)
