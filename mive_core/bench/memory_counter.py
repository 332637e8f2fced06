"""Counts the memory of live tensors, on a CPU or on the meta device."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of the live storages that were created inside the context: current and peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # bytes by storage
        self.current, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes.keys() | known:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
                self.peak = max(self.peak, self.current)
        return result

    def forget(self, key: int) -> None:
        self.current -= self.sizes.pop(key)
