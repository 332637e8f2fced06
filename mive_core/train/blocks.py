"""How a DiT's blocks run while it is trained: recomputed, waiting in main memory, compiled, sharded."""

from functools import partial

import torch
import torch.distributed as distributed
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from ..dit import MiVEDiT
from ..errors import UserError


def checkpoint_activations(model: MiVEDiT) -> None:
    """Gradient checkpointing: a block keeps its input only."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def offload(model: MiVEDiT) -> None:
    """What blocks keep, which after `checkpoint_activations` are their inputs, waits in main memory for the backward pass."""
    for block in model.blocks:
        block.forward = partial(_offloaded, block.forward)


def _offloaded(forward, *args, **kwargs):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return forward(*args, **kwargs)


def shard(model: MiVEDiT, bf16: bool = False) -> None:
    """FSDP2: a block's weights are whole only while it runs, the others' while the model does. Raises UserError where it runs alone.

    In bf16 they are put together so; parts, gradients' sums and what the optimizer sees stay as they are.
    """
    if not distributed.is_initialized():
        raise UserError("sharded training takes several processes", got="one", fix="start it with torchrun or `accelerate launch`")
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else MixedPrecisionPolicy()
    for part in (*model.blocks, model):
        fully_shard(part, mp_policy=policy)
    register_fsdp_forward_method(model, "embed_condition")


def part(model: MiVEDiT) -> None:
    """After forwards without a backward pass: what is sharded is in parts again, of which the outermost was left whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
