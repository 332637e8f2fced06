"""How much memory an edit takes, from shapes alone: weights, and what is alive at once in a forward without gradients.

Counted are tensors; an attention kernel's own workspace and what an allocator leaves unused come on top.
N tokens of the sequence (condition, reference and target), D width.
"""

import math

from .checkpoint import shapes_of
from .config import MiVEConfig
from .dit.blocks import PIECE
from .quantize import MATRIX

ATTENDING = 4  # of (N, D): the sequence, its modulated copy, queries, and the keys that are being turned
FLOAT32 = 4  # bytes
FEEDING = 3  # of (N, D): the sequence before the block and after the attention, its modulated copy


def activation_bytes(config: MiVEConfig, num_tokens: int, itemsize: int, batch: int = 1) -> int:
    """The most that one forward holds beside the weights, where numbers are of `itemsize` bytes."""
    rows = batch * num_tokens * config.width
    turning = ATTENDING * rows * itemsize + (rows * (FLOAT32 + itemsize) if itemsize < FLOAT32 else 0)
    attended = (ATTENDING + 2) * rows * itemsize  # values and result beside the queries and keys
    piece = batch * min(num_tokens, PIECE)
    inner = 2 * piece * config.ffn_width * itemsize  # before and after the activation
    rotary = num_tokens * config.head_dim // 2 * 2 * FLOAT32
    return max(turning, attended, FEEDING * rows * itemsize + inner) + rotary


def weight_bytes(config: MiVEConfig, itemsize: int, matrix_itemsize: int | None = None) -> int:
    """Of the whole DiT; `matrix_itemsize` is that of the blocks' matrices, where they are stored in fewer bytes."""
    total = 0
    for key, shape in shapes_of(config).items():
        total += math.prod(shape) * (matrix_itemsize if matrix_itemsize and MATRIX.fullmatch(key) else itemsize)
    return total
