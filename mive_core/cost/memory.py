"""Memory use of an edit, from shapes alone: weights, and the tensors alive at once in a forward pass without gradients.

Only tensors are counted; workspaces of kernels and unused memory of the allocator come on top.
N tokens in the DiT's sequence (condition, reference and target), D its width; S tokens in the VLM's sequence, V of them visual, D_vlm its
width; F pixel frames of H x W pixels.
"""

import math

from ..config import TEMPORAL_FACTOR, MiVEConfig
from ..dit.blocks import FFN_CHUNK
from ..formats.checkpoint import state_dict_shapes
from ..formats.quantize import MATRIX

FLOAT32_BYTES = 4
ATTENTION_TENSORS = 4  # number of (N, D): the sequence, its modulated copy, the queries, and the keys during rotation
FFN_TENSORS = 3  # number of (N, D): the sequence before the block, the one after the attention, and its modulated copy
LANGUAGE_TENSORS, VISUAL_TENSORS = 6, 10  # number of (S, D_vlm): the VLM's sequence; of (V, D_vlm): visual features with DeepStack's three
VISION_TENSORS, VISION_TENSORS_16_BIT = 3, 11  # number of (patches, vision width), with queries and keys rotated in float32
# Peak number of values per pixel, divided by the VAE's narrowest width: (a single frame, more frames with the caches of all convolutions).
DECODE_VALUES, ENCODE_VALUES = (18.0, 50.8), (10.0, 36.7)
CACHE_VALUES = 26.4  # of the former values while decoding: what the caches hold from one latent frame to the next
EXTRA_16_BIT = 2.0  # more of these values in 16 bits, because norms and resizing run in float32
CONV2D_EXTRA = (11.0, 14.0)  # more of these values on a CPU, where conv3d.py puts frames side by side: (decoding, encoding)
VAE_WIDTH = 96  # channels of Wan 2.1's VAE at full resolution
TILE, TILE_STRIDE = 256, 192  # pixels


def activation_bytes(config: MiVEConfig, num_tokens: int, itemsize: int, batch: int = 1, *, scores: bool = False) -> int:
    """Peak memory of one forward pass of the DiT without the weights, with numbers of `itemsize` bytes.

    `scores`: attention as two matrix products, which holds (N, N) twice per head; fused kernels do not.
    """
    rows = batch * num_tokens * config.width
    rotating = ATTENTION_TENSORS * rows * itemsize + (rows * (FLOAT32_BYTES + itemsize) if itemsize < FLOAT32_BYTES else 0)
    attention = (ATTENTION_TENSORS + 2) * rows * itemsize  # values and result in addition to queries and keys
    chunk = batch * min(num_tokens, FFN_CHUNK)
    inner = 2 * chunk * config.ffn_width * itemsize  # before and after the activation
    rotary = num_tokens * config.head_dim // 2 * 2 * FLOAT32_BYTES
    attention += 2 * batch * config.num_heads * num_tokens**2 * itemsize if scores else 0
    return max(rotating, attention, FFN_TENSORS * rows * itemsize + inner) + rotary


def weight_bytes(config: MiVEConfig, itemsize: int, matrix_itemsize: int | None = None) -> int:
    """Bytes of the DiT's weights; `matrix_itemsize`: bytes per number of the blocks' matrices, if they are quantized."""
    total = 0
    for key, shape in state_dict_shapes(config).items():
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
    """Peak memory of one forward pass of a Qwen3-VL without its weights and inputs.

    width: D_vlm; inner_width: of its feed-forward; num_tokens, num_visual: S, V; num_video: how many of V belong to the video (None: all;
    the image is encoded before it); num_layers: how many layers' states are kept; vision: the vision tower's width and inner width.
    Each visual token covers four patches.
    """
    language = num_tokens * (3 * inner_width + (LANGUAGE_TENSORS + num_layers - 2) * width) + VISUAL_TENSORS * num_visual * width
    vision_width, vision_inner_width = vision
    num_tensors = VISION_TENSORS if itemsize == FLOAT32_BYTES else VISION_TENSORS_16_BIT
    num_patches = 4 * (num_visual if num_video is None else num_video)
    return itemsize * max(language, num_patches * (3 * vision_inner_width + num_tensors * vision_width))


def vae_decode_bytes(num_frames: int, height: int, width: int, itemsize: int, *, channels: int = VAE_WIDTH, tiled: bool = False, conv2d: bool = False) -> int:
    """Peak memory of decoding F x H x W pixels without the weights, including latents and caches; `tiled` as in diffusers.

    `conv2d`: on a CPU, where conv3d.py computes the 3D convolutions as 2D ones.
    """
    per_pixel = _values_per_pixel(DECODE_VALUES, num_frames, itemsize, CONV2D_EXTRA[0] if conv2d else 0.0) * channels * itemsize
    pixels, colour = height * width, 3 * num_frames * itemsize
    if not tiled or max(height, width) <= TILE:
        return round(pixels * (per_pixel + colour))
    output = _covered(height) * _covered(width) * colour  # tiles overlap
    return round(max(TILE**2 * per_pixel + output, output + 3 * pixels * colour))  # 3: joined rows, the whole picture, its clamped copy


def vae_stream_bytes(height: int, width: int, itemsize: int, *, num_clips: int = 1, channels: int = VAE_WIDTH, conv2d: bool = False) -> int:
    """Peak memory of decoding latent frame by latent frame, for any length, without the weights and the latents.

    num_clips: decoded in turns, each with caches of its own; an edit and the source's round trip are two.
    """
    per_pixel = _values_per_pixel(DECODE_VALUES, TEMPORAL_FACTOR, itemsize, CONV2D_EXTRA[0] if conv2d else 0.0)
    values = (per_pixel + (num_clips - 1) * CACHE_VALUES) * channels * itemsize
    return round(height * width * (values + num_clips * 3 * TEMPORAL_FACTOR * FLOAT32_BYTES))


def vae_encode_bytes(num_frames: int, height: int, width: int, itemsize: int, *, channels: int = VAE_WIDTH, conv2d: bool = False) -> int:
    """Peak memory of encoding without the weights and the pixels."""
    return round(height * width * _values_per_pixel(ENCODE_VALUES, num_frames, itemsize, CONV2D_EXTRA[1] if conv2d else 0.0) * channels * itemsize)


def _values_per_pixel(values: tuple[float, float], num_frames: int, itemsize: int, conv2d_extra: float) -> float:
    single_frame, clip = values
    return single_frame if num_frames == 1 else clip + conv2d_extra + (EXTRA_16_BIT if itemsize < FLOAT32_BYTES else 0.0)


def _covered(side: int) -> int:
    """The sum of all tiles' sides along one axis."""
    return sum(min(TILE, side - start) for start in range(0, side, TILE_STRIDE))
