"""Runs workers over many items on a Ray cluster, in as many processes as are asked for."""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from .executor import Executor, Worker, process_items

MAX_BLOCKS = 10_000  # blocks that Ray can keep track of
LOCAL = "local"


@dataclass(frozen=True)
class RayExecutor(Executor):
    """Runs workers as Ray actors. What makes them and the items must be picklable, and paths must be the same on all machines."""

    address: str = LOCAL  # "local": a cluster on this machine; else the address of a cluster
    num_workers: int = 2
    num_gpus: float = 0  # per worker

    loads_per_worker: ClassVar[bool] = True

    def run(self, make_worker: Callable[[], Worker], indexed: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, dict]]:
        ray, started = _connect(self)
        try:
            rows = [{"index": index, "item": _Opaque(item)} for index, item in indexed]
            outcomes = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
                _Actor,
                fn_constructor_args=(make_worker,),
                batch_size=None,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=self.num_workers),
                num_cpus=1,
                num_gpus=self.num_gpus,
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


def _connect(executor: RayExecutor) -> tuple[Any, bool]:
    """Connects to Ray -> the module, and whether this call started the connection. Raises UserError."""
    ray = check_ray()
    started = not ray.is_initialized()
    if started:
        try:
            cluster = {"address": LOCAL, "num_cpus": max(executor.num_workers, os.cpu_count() or 1), "include_dashboard": False}
            ray.init(**(cluster if executor.address == LOCAL else {"address": executor.address}), log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise UserError(
                "there is no Ray cluster to be reached",
                where=f"ray {executor.address!r}",
                got=str(error).splitlines()[0],
                expected="local, or an address such as auto or host:6379",
            ) from None
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray, started
