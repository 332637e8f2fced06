"""One edit over several devices: each process that torchrun has started runs the DiT's blocks on its share of the tokens.

Rank 0 does all else: files, VLM, VAE, sampling, patch embedding and head. So the other ranks need neither VLM nor VAE in memory, nothing that
rounds differently on another card can reach the result by two ways, and errors of an edit are those of one process. A forward scatters the sequence
and its rotations before the first block and gathers it after the last. Within a block tokens meet in attention only, where an all-to-all gives each
rank all tokens of H / N heads and a second one gives them back (DeepSpeed Ulysses, arXiv 2309.14509). Lengths may differ by one token, so nothing
is padded.

By torch's collectives, because the exchange is a few lines. yunchang's needs parts of equal length; torch's context_parallel, still experimental,
covers the attention kernels of CUDA alone, not those of a CPU, sage or matmul; that of DeepSpeed comes with its training engine.
B batch, L tokens, L_r those of this rank, D model width, H heads, d head width, N ranks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor

from .attention import AttentionFn
from .config import MiVEConfig
from .dit import MiVEDiT
from .dit.blocks import Modulation
from .errors import UserError
from .pipeline import check_device
from .train.launcher import num_processes

HOW_TO_START = "`torchrun --nproc-per-node N -m mive_core edit ... --sequence-parallel`"
BETWEEN_FORWARDS = timedelta(days=7)  # how long a rank waits while rank 0 reads, encodes, decodes or writes; that it has ended shows at once


class ForwardFailed(RuntimeError):
    """A forward was left by some of its ranks. No further one is possible, whatever the cause."""


@dataclass(frozen=True)
class Forward:
    """What the other ranks must know of a forward before they take part."""

    batch: int
    num_tokens: int
    num_clean: int
    num_rotations: int  # batch of the rotations, B or 1
    dtype: torch.dtype


@dataclass
class Ranks:
    """The processes that share a sequence."""

    rank: int
    size: int
    device: torch.device
    waiting: distributed.ProcessGroup | None = None  # announces forwards, between CPUs
    tensors: distributed.ProcessGroup | None = None  # exchanges tensors; None: the default group
    parts: list[int] = field(default_factory=list)  # number of tokens of each rank, in the current forward

    def announce(self, forward: Forward | None) -> None:
        """Rank 0 starts a forward on the others; None ends them."""
        distributed.broadcast_object_list([forward], group=self.waiting)

    def next_forward(self) -> Forward | None:
        """Waits for rank 0 to start a forward. Exits with 2 if rank 0 has ended, which gives the reason itself."""
        announced: list[Forward | None] = [None]
        try:
            distributed.broadcast_object_list(announced, group=self.waiting)
        except RuntimeError:
            raise SystemExit(2) from None
        return announced[0]

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """(sum of sent, ...) -> (sum of received, ...): sent[i] rows go to rank i, received[i] come from it."""
        result = rows.new_empty(sum(received), *rows.shape[1:])
        distributed.all_to_all_single(result, rows.contiguous(), received, sent, group=self.tensors)
        return result

    def scatter(self, rows: Tensor) -> Tensor:
        """(L, ...) on rank 0, (0, ...) on the others -> (L_r, ...)."""
        nothing = [0] * (self.size - 1)
        return self.exchange(rows, [0, *nothing] if self.rank else self.parts, [self.parts[self.rank], *nothing])

    def gather(self, rows: Tensor) -> Tensor:
        """(L_r, ...) -> (L, ...) on rank 0, (0, ...) on the others."""
        nothing = [0] * (self.size - 1)
        return self.exchange(rows, [self.parts[self.rank], *nothing], [0, *nothing] if self.rank else self.parts)


def token_counts(num_tokens: int, num_ranks: int) -> list[int]:
    """L -> the number of tokens of each rank; they differ by at most one."""
    base, rest = divmod(num_tokens, num_ranks)
    return [base + (rank < rest) for rank in range(num_ranks)]


@dataclass(frozen=True)
class UlyssesAttention:
    """An AttentionFn over this rank's tokens that runs `function` on all tokens of this rank's heads."""

    function: AttentionFn
    ranks: Ranks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs) -> Tensor:
        """q, k, v (B, L_r, H*d), mask None or the same for all heads -> (B, L_r, H*d)."""
        q, k, v = (self.to_all_tokens(x) for x in (q, k, v))
        attended = self.function(q, k, v, heads // self.ranks.size, mask, **kwargs)
        del q, k, v
        return self.to_all_heads(attended)

    def to_all_tokens(self, x: Tensor) -> Tensor:
        """(B, L_r, H*d) -> (B, L, H/N*d)."""
        rows = x.unflatten(-1, (self.ranks.size, -1)).permute(2, 1, 0, 3).flatten(0, 1)
        return self.ranks.exchange(rows, [x.shape[1]] * self.ranks.size, self.ranks.parts).transpose(0, 1)

    def to_all_heads(self, x: Tensor) -> Tensor:
        """(B, L, H/N*d) -> (B, L_r, H*d)."""
        own = self.ranks.parts[self.ranks.rank]
        rows = self.ranks.exchange(x.transpose(0, 1), self.ranks.parts, [own] * self.ranks.size)
        return rows.unflatten(0, (self.ranks.size, own)).permute(2, 1, 0, 3).flatten(2)


class SharedBlocks:
    """The blocks of a DiT, run by all ranks together. On rank 0 the DiT runs them by itself from then on; the others call `follow`."""

    def __init__(self, dit: MiVEDiT, ranks: Ranks):
        self.blocks, self.ranks, self.width, self.rotations = dit.blocks, ranks, dit.config.width, dit.config.head_dim // 2
        for block in dit.blocks:
            block.self_attn.attention = torch.compiler.disable(UlyssesAttention(block.self_attn.attention, ranks))
        if not ranks.rank:
            dit.run_block = self.run_block  # type: ignore[assignment, method-assign]

    def run_block(self, index: int, sequence: Tensor, time: Modulation, rotary: Tensor) -> Tensor:
        """MiVEDiT.run_block of rank 0. The first block takes (B, L, D), the last one returns it; between them there are (B, L_r, D)."""
        try:
            if not index:
                self.ranks.announce(Forward(len(sequence), sequence.shape[1], time.num_clean, len(rotary), sequence.dtype))
                self.ranks.parts = token_counts(sequence.shape[1], self.ranks.size)
                sequence = self.cut(sequence, time, rotary)
            sequence = self.blocks[index](sequence, self.time, self.rotary)
            return sequence if index < len(self.blocks) - 1 else self.ranks.gather(sequence.transpose(0, 1)).transpose(0, 1)
        except (RuntimeError, MemoryError) as error:
            raise ForwardFailed(str(error) or type(error).__name__) from error

    @torch.inference_mode()
    def follow(self) -> None:
        """Takes part in rank 0's forwards until it ends them. Raises UserError if one fails."""
        while forward := self.ranks.next_forward():
            try:
                self.take_part(forward)
            except (RuntimeError, MemoryError) as error:
                raise failure(error, self.ranks) from error

    def take_part(self, forward: Forward) -> None:
        self.ranks.parts = token_counts(forward.num_tokens, self.ranks.size)
        sequence = torch.empty(forward.batch, 0, self.width, dtype=forward.dtype, device=self.ranks.device)
        clean, target = (sequence.new_empty(batch, 6, self.width) for batch in (1, forward.batch))
        rotary = torch.empty(forward.num_rotations, 0, 1, self.rotations, dtype=torch.complex64, device=self.ranks.device)
        sequence = self.cut(sequence, Modulation(clean, target, forward.num_clean), rotary)
        for block in self.blocks:
            sequence = block(sequence, self.time, self.rotary)
        self.ranks.gather(sequence.transpose(0, 1))

    def cut(self, sequence: Tensor, time: Modulation, rotary: Tensor) -> Tensor:
        """Everything of rank 0, nothing but shapes on the others -> this rank's (B, L_r, D); keeps its modulation and rotations for the blocks."""
        for vectors in (time.clean, time.target):
            distributed.broadcast(vectors, 0, group=self.ranks.tensors)
        first, own = sum(self.ranks.parts[: self.ranks.rank]), self.ranks.parts[self.ranks.rank]
        self.time = replace(time, num_clean=min(max(time.num_clean - first, 0), own))
        self.rotary = torch.view_as_complex(self.ranks.scatter(torch.view_as_real(rotary).transpose(0, 1))).transpose(0, 1)
        return self.ranks.scatter(sequence.transpose(0, 1)).transpose(0, 1)


def failure(error: BaseException, ranks: Ranks) -> UserError:
    """What is told of a forward that failed on this rank."""
    return UserError(
        f"a forward over {ranks.size} processes failed on rank {ranks.rank}",
        got=str(error) or type(error).__name__,
        fix="if another rank says more, that is the cause; where memory runs out take fewer frames, a smaller --size or --dtype bf16",
    )


@contextmanager
def connected(device: str) -> Iterator[Ranks]:
    """Connects the processes that torchrun has started; at the end rank 0 lets the others go.

    Raises UserError without torchrun, and for a forward that failed.
    """
    if num_processes() == 1:
        raise UserError("sequence parallelism takes several processes", where="--sequence-parallel", got="one", fix=f"start it with {HOW_TO_START}")
    try:
        distributed.init_process_group("gloo")
    except ValueError as error:  # a variable of the environment is missing
        raise UserError("the processes cannot find one another", where="--sequence-parallel", got=str(error), fix=f"start it with {HOW_TO_START}") from error
    local = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), local, distributed.new_group(backend="gloo", timeout=BETWEEN_FORWARDS))
    try:
        yield ranks
    except ForwardFailed as error:
        raise failure(error, ranks) from error
    if not ranks.rank:
        ranks.announce(None)
    distributed.destroy_process_group()


def prepare_ranks(ranks: Ranks, config: MiVEConfig) -> None:
    """Prepares the device of each rank. Raises the same UserError on all ranks if there are too few of them, or N does not divide the heads."""
    if config.num_heads % ranks.size:
        fitting = [str(size) for size in range(2, config.num_heads + 1) if not config.num_heads % size]
        raise UserError(
            "the number of processes must divide the DiT's heads",
            where="--sequence-parallel",
            got=f"{ranks.size} processes, {config.num_heads} heads",
            fix=f"start it with --nproc-per-node {' or '.join(fitting)}",
        )
    if ranks.device.type != "cuda":
        return
    check_device(ranks.device)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if num_local > torch.cuda.device_count():
        raise UserError("each process takes a GPU of its own", where="--sequence-parallel", got=f"{num_local} processes, {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(ranks.device)
    ranks.tensors = distributed.new_group(backend="nccl")


def follow(ranks: Ranks, load: Callable[[], MiVEDiT]) -> None:
    """Runs blocks for rank 0 until it ends. What cannot be loaded is told by rank 0, unless rank 0 could load it."""
    try:
        blocks = SharedBlocks(load(), ranks)
    except UserError:
        ranks.next_forward()
        raise
    blocks.follow()
