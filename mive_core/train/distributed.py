"""Several processes that train one model, each on its share of a step's batches: started by torchrun or `accelerate launch`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class ProcessGroup:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs, checkpoints and the export."""
        return self.rank == 0

    def batches_of(self, step: int, gradient_accumulation_steps: int) -> range:
        """The numbers of this process's batches of a step; together the processes take size * gradient_accumulation_steps in a row."""
        first = (step * self.size + self.rank) * gradient_accumulation_steps
        return range(first, first + gradient_accumulation_steps)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its mean over the processes, in one exchange for each dtype; gradients of sharded weights already are."""
        if self.size == 1:
            return
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                continue
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for alike in kinds.values():
            joined = torch.cat([tensor.reshape(-1) for tensor in alike])
            distributed.all_reduce(joined)
            for tensor, part in zip(alike, joined.div_(self.size).split([tensor.numel() for tensor in alike])):
                tensor.copy_(part.view_as(tensor))

    def agree(self, answer: bool) -> bool:
        """What the first process answers, on all: clocks differ."""
        if self.size == 1:
            return answer
        answers = [answer]
        distributed.broadcast_object_list(answers)
        return answers[0]

    def gather(self, item: object) -> list:
        """Every process's item, on all."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def num_processes() -> int:
    """What the launcher's environment says; 1 where there is no launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[ProcessGroup]:
    """The processes that the launcher's environment names, connected; one alone where there is no launcher."""
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


def whole(value: Tensor) -> Tensor:
    """A tensor that processes hold in parts, put together; all of them must ask. Any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in the parts that `like` is in."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements) if isinstance(like, DTensor) else value
