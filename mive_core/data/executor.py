"""Runs a worker over many items; yields each item's outcome once, in order of completion.

A thread prefetches the next item while the current one is processed, so that decoding and models run in parallel.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol

import torch

from ..errors import UserError

SKIPPED_ERRORS = (UserError, torch.OutOfMemoryError)  # the item is skipped; other errors end the run


class Worker(Protocol):
    """Processes items. Both methods may raise UserError for an unusable item, which is then skipped."""

    def read(self, item: Any) -> Any:
        """Reads the item's data from disk."""

    def work(self, item: Any, read: Any) -> dict:
        """Returns a result that JSON can hold. Must write files atomically, because a killed worker's item is processed again."""


class Executor:
    """Runs one worker, in this process."""

    loads_per_worker: ClassVar[bool] = False  # whether each worker has models of its own

    def run(self, make_worker: Callable[[], Worker], indexed: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, dict]]:
        """Yields the outcomes of pairs (index, item) in any order."""
        return process_items(make_worker(), indexed)


def run_items(make_worker: Callable[[], Worker], items: Sequence[Any], executor: Executor = Executor()) -> Iterator[tuple[int, dict]]:
    """Yields each item's index once, with {"result": the return value of `work`} or {"why": the reason it is skipped}.

    `make_worker` loads the models, once per worker. Raises UserError if the executor cannot be reached.
    """
    indexed = list(enumerate(items))
    return executor.run(make_worker, indexed) if indexed else iter(())


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
