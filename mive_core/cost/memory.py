"""How much memory an edit takes, from shapes alone: weights, and what is alive at once in a forward without gradients.

Counted are tensors; a kernel's own workspace and what an allocator leaves unused come on top.
N tokens of the DiT's sequence (condition, reference and target), D its width; S tokens of the VLM's, V of them visual, D_vlm its width;
F pixel frames of H x W pixels.
"""

import math

from ..config import MiVEConfig
from ..dit.blocks import PIECE
from ..formats.checkpoint import shapes_of
from ..formats.quantize import MATRIX

ATTENDING = 4  # of (N, D): the sequence, its modulated copy, queries, and the keys that are being turned
FLOAT32 = 4  # bytes
FEEDING = 3  # of (N, D): the sequence before the block and after the attention, its modulated copy
READING, LOOKED_AT = 6, 10  # of (S, D_vlm) and (V, D_vlm): the VLM's sequence; its pictures' features, DeepStack's three among them
SEEING, SEEING_16_BIT = 3, 11  # of the vision tower's (patches, width), queries and keys being turned in float32 among them
# values of the VAE's narrowest width that stand for each pixel at most: one frame alone, else the caches of all convolutions with it
DECODING, ENCODING = (18.0, 50.8), (10.0, 36.7)
IN_16_BIT = 2.0  # more of them, since norms and resizing are in float32
CONV2D_FACTORS = (11.0, 14.0)  # more of them on a CPU, where conv3d.py lays frames side by side: decoding, encoding
VAE_WIDTH = 96  # of Wan 2.1's VAE at full resolution
TILE, TILE_STRIDE = 256, 192  # pixels


def activation_bytes(config: MiVEConfig, num_tokens: int, itemsize: int, batch: int = 1, *, scores: bool = False) -> int:
    """The most that one forward of the DiT holds beside the weights, where numbers are of `itemsize` bytes.

    `scores` is for attention as two matrix products, which holds (N, N) twice a head; fused kernels do not.
    """
    rows = batch * num_tokens * config.width
    turning = ATTENDING * rows * itemsize + (rows * (FLOAT32 + itemsize) if itemsize < FLOAT32 else 0)
    attended = (ATTENDING + 2) * rows * itemsize  # values and result beside the queries and keys
    piece = batch * min(num_tokens, PIECE)
    inner = 2 * piece * config.ffn_width * itemsize  # before and after the activation
    rotary = num_tokens * config.head_dim // 2 * 2 * FLOAT32
    attended += 2 * batch * config.num_heads * num_tokens**2 * itemsize if scores else 0
    return max(turning, attended, FEEDING * rows * itemsize + inner) + rotary


def weight_bytes(config: MiVEConfig, itemsize: int, matrix_itemsize: int | None = None) -> int:
    """Of the whole DiT; `matrix_itemsize` is that of the blocks' matrices, where they are stored in fewer bytes."""
    total = 0
    for key, shape in shapes_of(config).items():
        total += math.prod(shape) * (matrix_itemsize if matrix_itemsize and MATRIX.fullmatch(key) else itemsize)
    return total


def vlm_bytes(
    width: int,
    inner_width: int,
    num_tokens: int,
    num_visual: int,
    itemsize: int,
    *,
    num_video: int | None = None,
    num_layers: int = 2,
    vision: tuple[int, int] = (1152, 4304),
) -> int:
    """The most that one forward of a Qwen3-VL holds beside its weights and inputs: D_vlm and the width of its feed-forward, S and V
    tokens, how many of V are the video's (None: all; the image is seen before it), how many layers' states are kept, the vision
    tower's two widths. Each visual token stands for four patches."""
    reading = num_tokens * (3 * inner_width + (READING + num_layers - 2) * width) + LOOKED_AT * num_visual * width
    inside, feeding = vision
    seeing = 4 * (num_visual if num_video is None else num_video) * (3 * feeding + (SEEING if itemsize == FLOAT32 else SEEING_16_BIT) * inside)
    return itemsize * max(reading, seeing)


def vae_decode_bytes(num_frames: int, height: int, width: int, itemsize: int, *, channels: int = VAE_WIDTH, tiled: bool = False, planes: bool = False) -> int:
    """The most that decoding F x H x W pixels holds beside the weights, latents and caches included, `tiled` as diffusers does it.

    `planes` is for a CPU, where the library lays convolutions out so.
    """
    per_pixel = _per_pixel(DECODING, num_frames, itemsize, CONV2D_FACTORS[0] if planes else 0.0) * channels * itemsize
    pixels, colour = height * width, 3 * num_frames * itemsize
    if not tiled or max(height, width) <= TILE:
        return round(pixels * (per_pixel + colour))
    made = _covered(height) * _covered(width) * colour  # tiles overlap
    return round(max(TILE**2 * per_pixel + made, made + 3 * pixels * colour))  # joined by rows, as a whole, and clamped


def vae_encode_bytes(num_frames: int, height: int, width: int, itemsize: int, *, channels: int = VAE_WIDTH, planes: bool = False) -> int:
    """The most that encoding holds beside the weights and the pixels."""
    return round(height * width * _per_pixel(ENCODING, num_frames, itemsize, CONV2D_FACTORS[1] if planes else 0.0) * channels * itemsize)


def _per_pixel(values: tuple[float, float], num_frames: int, itemsize: int, planes: float) -> float:
    first, later = values
    return first if num_frames == 1 else later + planes + (IN_16_BIT if itemsize < FLOAT32 else 0.0)


def _covered(side: int) -> int:
    """The sum of all tiles' sides along one axis."""
    return sum(min(TILE, side - start) for start in range(0, side, TILE_STRIDE))
