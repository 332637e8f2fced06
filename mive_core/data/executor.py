"""Runs a worker over many items, in this process or on Ray; yields each item's outcome once, in order of completion.

A thread prefetches the next item while the current one is processed, so that decoding and models run in parallel.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import UserError

MAX_BLOCKS = 10_000  # blocks that Ray can keep track of
SKIPPED_ERRORS = (UserError, torch.OutOfMemoryError)  # the item is skipped; other errors end the run
LOCAL = "local"


class Worker(Protocol):
    """Processes items. Both methods may raise UserError for an unusable item, which is then skipped."""

    def read(self, item: Any) -> Any:
        """Reads the item's data from disk."""

    def work(self, item: Any, read: Any) -> dict:
        """Returns a result that JSON can hold. Must write files atomically, because a killed worker's item is processed again."""


@dataclass(frozen=True)
class Executor:
    """Where the workers run."""

    ray: str | None = None  # None: in this process; "local": a cluster on this machine; else the address of a cluster
    num_workers: int = 2  # Ray actors, each with its own models
    num_gpus: float = 0  # GPUs per actor


def run_items(make_worker: Callable[[], Worker], items: Sequence[Any], executor: Executor = Executor()) -> Iterator[tuple[int, dict]]:
    """Yields each item's index once, with {"result": the return value of `work`} or {"why": the reason it is skipped}.

    `make_worker` loads the models, once per worker. On Ray it and the items must be picklable, and paths must be the same on all
    machines. Raises UserError if Ray is unavailable.
    """
    indexed = list(enumerate(items))
    if not indexed:
        return iter(())
    return _run_on_ray(make_worker, indexed, executor) if executor.ray else process_items(make_worker(), indexed)


def process_items(worker: Worker, indexed: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict]]:
    """Yields the outcomes of one worker."""
    for (index, item), read in prefetch(indexed, lambda pair: worker.read(pair[1])):
        try:
            yield index, {"result": worker.work(item, read())}
        except SKIPPED_ERRORS as error:
            yield index, {"why": str(error)}


def prefetch(items: Iterable[Any], read: Callable[[Any], Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Yields each item with a function that returns the result of `read`, or raises its error; a thread reads one item ahead."""
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for item in items:
            submitted = item, thread.submit(read, item).result
            if pending is not None:
                yield pending
            pending = submitted
        if pending is not None:
            yield pending


def _run_on_ray(make_worker: Callable[[], Worker], indexed: list[tuple[int, Any]], executor: Executor) -> Iterator[tuple[int, dict]]:
    ray, started = _connect(executor)
    try:
        rows = [{"index": index, "item": _Opaque(item)} for index, item in indexed]
        outcomes = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
            _Actor,
            fn_constructor_args=(make_worker,),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=executor.num_workers),
            num_cpus=1,
            num_gpus=executor.num_gpus,
        )
        for row in outcomes.iter_rows():
            yield int(row["index"]), json.loads(row["outcome"])
    finally:
        if started:
            ray.shutdown()


@dataclass(frozen=True)
class _Opaque:
    """Wraps an item, because Ray would convert numbers, lists and mappings to Arrow's types."""

    item: Any


class _Actor:
    """A worker for Ray Data, which calls it on one block of items after another."""

    def __init__(self, make_worker: Callable[[], Worker]):
        self.worker = make_worker()

    def __call__(self, block: dict) -> Iterator[dict]:
        for index, outcome in process_items(self.worker, zip(block["index"].tolist(), (opaque.item for opaque in block["item"]))):
            yield {"index": [index], "outcome": [json.dumps(outcome)]}


def check_ray():
    """Imports Ray. Raises UserError if it is not installed."""
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal")):  # keeps stderr free, unless the environment sets them
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs the package ray", got=str(error), fix='pip install "mive[ray]"') from None
    return ray


def _connect(executor: Executor) -> tuple[Any, bool]:
    """Connects to Ray -> the module, and whether this call started the connection. Raises UserError."""
    ray = check_ray()
    started = not ray.is_initialized()
    if started:
        try:
            cluster = {"address": LOCAL, "num_cpus": max(executor.num_workers, os.cpu_count() or 1), "include_dashboard": False}
            ray.init(**(cluster if executor.ray == LOCAL else {"address": executor.ray}), log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                "there is no Ray cluster to be reached",
                where=f"ray {executor.ray!r}",
                got=str(error).splitlines()[0],
                expected="local, or an address such as auto or host:6379",
            ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray, started
