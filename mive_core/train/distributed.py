"""Data-parallel training: processes split the batches of each step. `train.launcher` connects them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process and the number of processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes logs, checkpoints and the export."""
        return self.rank == 0

    def batches_of(self, step: int, gradient_accumulation_steps: int) -> range:
        """Returns the indices of this process's batches of a step; all processes together take size * gradient_accumulation_steps consecutive ones."""
        first = (step * self.size + self.rank) * gradient_accumulation_steps
        return range(first, first + gradient_accumulation_steps)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, with one all-reduce per dtype; skips DTensors, whose gradients FSDP has averaged already."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if isinstance(tensor, DTensor):
                continue
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same_dtype in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same_dtype])
            distributed.all_reduce(flat)
            for tensor, part in zip(same_dtype, flat.div_(self.size).split([tensor.numel() for tensor in same_dtype])):
                tensor.copy_(part.view_as(tensor))

    def broadcast(self, value: bool) -> bool:
        """Returns the first process's value on all processes, for instance a decision by its clock."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def gather(self, item: object) -> list:
        """Returns the items of all processes, by rank, on all processes."""
        if self.size == 1:
            return [item]
        items: list = [None] * self.size
        distributed.all_gather_object(items, item)
        return items

    def barrier(self) -> None:
        """Waits until all processes have reached this call."""
        if self.size > 1:
            distributed.barrier()


def full_tensor(value: Tensor) -> Tensor:
    """Gathers a DTensor into a full tensor, which all processes must call together; returns any other tensor unchanged."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Shards a full tensor like the DTensor `like`; returns it unchanged if `like` is a plain tensor."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements) if isinstance(like, DTensor) else value
