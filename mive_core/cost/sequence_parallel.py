"""Memory and traffic of a forward whose tokens are shared among N ranks, see mive_core/sequence_parallel.py, from shapes alone.

Only tensors are counted, as in memory.py. L tokens, D model width.
"""

from ..config import MiVEConfig
from ..dit.blocks import FFN_CHUNK
from .memory import FFN_TENSORS, FLOAT32_BYTES

# number of (L/N, D): the sequence, its modulated copy; queries, keys and values of own tokens and of all; the result of own heads, twice
ATTENTION_TENSORS = 10
WHOLE_TENSORS = 3  # number of (L, D) that rank 0 holds outside the blocks
EXCHANGES = 4  # number of (L/N, D) that a rank exchanges in a block: queries, keys, values and the result


def shared_activation_bytes(config: MiVEConfig, num_tokens: int, num_ranks: int, itemsize: int) -> tuple[int, int]:
    """Peak memory of a forward at batch 1 without weights: of rank 0, which also holds the whole sequence, and of each other rank."""
    whole, own_tokens = num_tokens * config.width * itemsize, -(-num_tokens // num_ranks)
    own, inner = own_tokens * config.width * itemsize, 2 * min(own_tokens, FFN_CHUNK) * config.ffn_width * itemsize
    others = max(ATTENTION_TENSORS * own, FFN_TENSORS * own + inner) + own_tokens * rotation_bytes(config)
    return max(others + whole + num_tokens * rotation_bytes(config), WHOLE_TENSORS * whole), others


def exchanged_bytes(config: MiVEConfig, num_tokens: int, num_ranks: int, itemsize: int) -> float:
    """Bytes that the busiest rank, the first, sends in a forward at batch 1, and receives as well: the exchanges of all blocks, and scattering."""
    whole, away = num_tokens * config.width * itemsize, (num_ranks - 1) / num_ranks
    return (config.num_blocks * EXCHANGES * whole / num_ranks + whole + num_tokens * rotation_bytes(config)) * away


def rotation_bytes(config: MiVEConfig) -> int:
    """Bytes of a token's rotations, (d/2) complex64."""
    return config.head_dim // 2 * 2 * FLOAT32_BYTES
