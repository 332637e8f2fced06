"""A worker over many items, in this process or on Ray: each item's outcome once, in the order in which they are done.

A worker reads an item in a thread, one item ahead of its work, so that decoding and models run side by side.
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

MAX_BLOCKS = 10_000  # what Ray keeps track of
SKIPPED_ERRORS = (UserError, torch.OutOfMemoryError)  # what leaves an item out, where other errors end the work
LOCAL = "local"


class Worker(Protocol):
    """What is done with an item. Both raise UserError where the item cannot be used, which leaves it out."""

    def read(self, item: Any) -> Any:
        """What the item names, from the disk."""

    def work(self, item: Any, read: Any) -> dict:
        """The outcome, which JSON can hold; files are written whole or not at all, since a killed worker's item is done again."""


@dataclass(frozen=True)
class Executor:
    """Where the work is done."""

    ray: str | None = None  # None: in this process; "local": a cluster of this machine; else the address of one
    num_workers: int = 2  # actors on Ray, each with models of its own
    num_gpus: float = 0  # that each of them takes


def run_items(make: Callable[[], Worker], items: Sequence[Any], executor: Executor = Executor()) -> Iterator[tuple[int, dict]]:
    """The index of each item, once, and {"result": what `work` gave} or {"why": the reason it is left out}.

    `make` loads the models, once in each worker; on Ray it and the items must be picklable, and paths the same on every machine.
    Raises UserError where Ray is not there.
    """
    numbered = list(enumerate(items))
    if not numbered:
        return iter(())
    return _run_on_ray(make, numbered, executor) if executor.ray else done(make(), numbered)


def done(worker: Worker, numbered: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict]]:
    """The outcomes of one worker."""
    for (index, item), read in ahead(numbered, lambda pair: worker.read(pair[1])):
        try:
            yield index, {"result": worker.work(item, read())}
        except SKIPPED_ERRORS as error:
            yield index, {"why": str(error)}


def ahead(items: Iterable[Any], read: Callable[[Any], Any]) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """Each item with a function that gives what `read` gave, or raises what it raised: read in a thread while the last one is worked on."""
    with ThreadPoolExecutor(1) as thread:
        before = None
        for item in items:
            now = item, thread.submit(read, item).result
            if before is not None:
                yield before
            before = now
        if before is not None:
            yield before


def _run_on_ray(make: Callable[[], Worker], numbered: list[tuple[int, Any]], executor: Executor) -> Iterator[tuple[int, dict]]:
    ray, started = _started(executor)
    try:
        rows = [{"index": index, "item": _Sealed(item)} for index, item in numbered]
        outcomes = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
            _Actor,
            fn_constructor_args=(make,),
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
class _Sealed:
    """An item that Ray carries as it is: numbers, lists and mappings would become those of Arrow."""

    item: Any


class _Actor:
    """A worker as Ray Data runs it: over one block of items after another."""

    def __init__(self, make: Callable[[], Worker]):
        self.worker = make()

    def __call__(self, block: dict) -> Iterator[dict]:
        for index, outcome in done(self.worker, zip(block["index"].tolist(), (sealed.item for sealed in block["item"]))):
            yield {"index": [index], "outcome": [json.dumps(outcome)]}


def check_ray():
    """Ray, if it is installed. Raises UserError."""
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal")):  # stderr is left to us unless the environment says otherwise
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--ray needs the package ray", got=str(error), fix='pip install "mive[ray]"') from None
    return ray


def _started(executor: Executor):
    """Ray, connected, and whether it was this function that did so. Raises UserError."""
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
