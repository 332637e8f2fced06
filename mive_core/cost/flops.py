"""Floating-point operations of our DiT and of Wan's with its cross-attention, from shapes alone; a multiply-add counts as two."""

import math
from dataclasses import dataclass

from ..config import MiVEConfig

NUM_TEXT_TOKENS = 512  # tokens that Wan's cross-attention reads


@dataclass(frozen=True)
class Layout:
    """The composition of a sequence; num_tokens is the length of self-attention in both models."""

    num_condition: int
    grid: tuple[int, int, int]  # target frames, patch rows, patch columns
    num_references: int = 1  # the reference and the keyframes

    @property
    def num_tokens(self) -> int:
        return self.num_condition + (self.grid[0] + self.num_references) * self.grid[1] * self.grid[2]


def layout_for(num_tokens: int) -> Layout:
    """A layout of about num_tokens; a twentieth are condition tokens, as at 720p x 81 frames."""
    num_frames = 7
    side = round(math.sqrt(0.95 * num_tokens / (num_frames + 1)))
    num_visual = (num_frames + 1) * side * side
    return Layout(max(num_tokens - num_visual, 1), (num_frames, side, side))


def block_flops(config: MiVEConfig, num_tokens: int) -> float:
    """One of our blocks at batch 1."""
    width = config.width
    return 2 * num_tokens * (4 * width**2 + 2 * width * config.ffn_width) + 4 * num_tokens**2 * width


def cross_attention_flops(config: MiVEConfig, num_tokens: int) -> float:
    """The cross-attention of one of Wan's blocks: queries and output over the video, keys and values over the text."""
    width = config.width
    return 4 * num_tokens * width**2 + 4 * NUM_TEXT_TOKENS * width**2 + 4 * num_tokens * NUM_TEXT_TOKENS * width


def non_block_flops(config: MiVEConfig, layout: Layout, ours: bool) -> float:
    """Everything outside the blocks: patch embedding, head and the projection of the condition tokens."""
    width, channels = config.width, config.latent_channels
    per_patch = math.prod(config.patch_size)
    rows = layout.grid[1] * layout.grid[2]
    if not ours:
        num_visual = layout.num_tokens
        return 4 * num_visual * per_patch * channels * width + 2 * NUM_TEXT_TOKENS * (config.vlm_width * width + width**2)
    embedded, target = (layout.grid[0] + layout.num_references) * rows, layout.grid[0] * rows
    context = 2 * layout.num_condition * (config.vlm_width * width + width**2)
    return 2 * per_patch * channels * width * (2 * embedded + target) + context


def new_part_flops(config: MiVEConfig, layout: Layout) -> float:
    """One forward pass of what Wan lacks: our patch embedding and the projection of the condition tokens."""
    head = 2 * math.prod(config.patch_size) * config.latent_channels * config.width * math.prod(layout.grid)
    return non_block_flops(config, layout, ours=True) - head


def dit_flops(config: MiVEConfig, layout: Layout) -> float:
    """One forward pass of our DiT at batch 1."""
    return config.num_blocks * block_flops(config, layout.num_tokens) + non_block_flops(config, layout, ours=True)


def training_flops(config: MiVEConfig, layout: Layout, *, frozen: bool = False, new_parts: bool = False) -> float:
    """One forward and one backward pass at batch 1.

    `frozen`: without weight gradients, as in LoRA training; the LoRA itself is not counted. `new_parts`: with those of the parts that Wan lacks.
    """
    forward, attention = dit_flops(config, layout), config.num_blocks * 4 * layout.num_tokens**2 * config.width
    if not frozen:
        return 3 * forward
    return 2 * (forward - attention) + 3 * attention + (new_part_flops(config, layout) if new_parts else 0.0)
