"""The processes that torchrun or `accelerate launch` has started, as the environment describes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as distributed

from .distributed import ProcessGroup


def num_processes() -> int:
    """Returns WORLD_SIZE as set by the launcher; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_batches(num_steps: int, gradient_accumulation_steps: int) -> int:
    """Returns the number of batches that a run reads: every step takes `gradient_accumulation_steps` of each process."""
    return num_steps * gradient_accumulation_steps * num_processes()


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup]:
    """Connects the processes that the launcher has started; without a launcher, yields a group of one."""
    if num_processes() == 1:
        yield ProcessGroup()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
