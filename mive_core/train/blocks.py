"""Memory savers for a DiT's blocks in training: gradient checkpointing, activation offload, FSDP2 sharding."""

from functools import partial

import torch
import torch.distributed as distributed
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from ..dit import MiVEDiT
from ..errors import UserError


def checkpoint_activations(model: MiVEDiT) -> None:
    """Enables gradient checkpointing: each block keeps only its input and recomputes the rest in the backward pass."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def offload_activations(model: MiVEDiT) -> None:
    """Moves the activations that blocks keep (after `checkpoint_activations`: their inputs) to main memory until the backward pass."""
    for block in model.blocks:
        block.forward = partial(_offloaded, block.forward)


def _offloaded(forward, *args, **kwargs):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)


def shard(model: MiVEDiT, bf16: bool = False) -> None:
    """Shards the weights with FSDP2: those of a block are gathered while it runs, the rest while the model runs.

    `bf16` gathers weights in bfloat16 and reduces gradients in float32; the shards and the optimizer state keep their dtype.
    Raises UserError if there is only one process.
    """
    if not distributed.is_initialized():
        raise UserError("sharded training takes several processes", got="one", fix="start it with torchrun or `accelerate launch`")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=policy)
    register_fsdp_forward_method(model, "embed_condition")


def reshard(model: MiVEDiT) -> None:
    """Frees the gathered weights after a forward pass without a backward pass: FSDP2 leaves those of the root module gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
