"""What a training takes, from shapes alone: memory of a device, seconds of a step, bytes that are moved.

Blocks are recomputed throughout. N tokens of one sequence, D the DiT's width, F its feed-forwards' inner width, P blocks.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

from ..config import PRESETS, MiVEConfig
from ..cost.flops import Layout, dit_flops, training_flops
from ..cost.memory import weight_bytes
from ..errors import UserError
from ..formats.checkpoint import shapes_of
from .flow_matching import DTYPES, FlowMatchingRecipe
from .throughput import PEAK_TFLOPS

# Bytes of one block's activations while it runs backward, for each of (N D) and (N F): counted, see tests. What is kept of each block
# comes on top, its input of N D numbers. By bytes of a number, and whether weights have gradients.
WORKING = {(2, True): (45, 5), (2, False): (29, 7), (4, True): (69, 10), (4, False): (48, 14)}
IN_FLIGHT = 3  # blocks that are whole at once where weights are sharded: the one that runs, the next one, one's gradients
RESERVED = 1e9  # bytes for the system
CARDS = {"H100": 80e9, "A100": 80e9, "RTX 4090": 24e9, "RTX 3090": 24e9}  # bytes
PER_NODE = 8
NVLINK, INFINIBAND, HOST = 450e9, 50e9, 50e9  # bytes a second and card each way: within a node, where it takes several, to main memory
ADAM, ADAM_8BIT = 2, 2  # averages of a weight's own size; bytes in 8 bits


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    in_flight: int  # whole weights of blocks, where they are sharded

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def memory_of(recipe: FlowMatchingRecipe, config: MiVEConfig, num_tokens: int, num_processes: int = 1) -> Memory:
    """Of a recipe that recomputes, with sequences of N tokens. Raises UserError for one that does not."""
    if not recipe.gradient_checkpointing:
        raise UserError("memory is counted where blocks are recomputed", where="gradient_checkpointing", got=False)
    itemsize = DTYPES[getattr(recipe, "weight_dtype", "fp32")].itemsize
    frozen = weight_bytes(config, itemsize, 1 if getattr(recipe, "float8", "") == "kept" else None)
    trained = lora_size(config, recipe.lora_rank) * 4 if recipe.lora_rank else frozen
    share = num_processes if recipe.sharded else 1
    number = 2 if recipe.bf16 else 4
    rows = recipe.batch_size * num_tokens
    kept = 0 if recipe.offload else kept_bytes(config, rows, number)
    wide, inner = WORKING[number, not recipe.lora_rank]
    optimizer = trained * ADAM if recipe.optimizer == "adamw" else trained // (4 if recipe.lora_rank else itemsize) * ADAM_8BIT
    return Memory(
        weights=(frozen // share) + (trained if recipe.lora_rank else 0),
        gradients=trained // share,
        optimizer=optimizer // share,
        averages=trained // share if recipe.ema_decay else 0,
        activations=kept + rows * (wide * config.width + inner * config.ffn_width),
        in_flight=IN_FLIGHT * block_size(config) * number if recipe.sharded else 0,
    )


def block_size(config: MiVEConfig) -> int:
    """How many weights a block has."""
    return sum(math.prod(shape) for key, shape in shapes_of(replace(config, num_blocks=1)).items() if key.startswith("blocks."))


def lora_size(config: MiVEConfig, rank: int) -> int:
    """How many weights a LoRA on all six layers of each block has."""
    return config.num_blocks * rank * (4 * 2 * config.width + 2 * (config.width + config.ffn_width))


def layout_of(size: tuple[int, int], num_frames: int) -> Layout:
    """Width, height and frames -> the sequence, with the paper's share of condition tokens, a twentieth."""
    grid = ((num_frames - 1) // 4 + 1, size[1] // 16, size[0] // 16)
    return Layout((grid[0] + 1) * grid[1] * grid[2] // 19, grid)


def scale(preset: str = "14b", *, card: str = "H100", share_of_peak: float = 0.45, processes: tuple[int, ...] = (8, 32, 128), num_frames: int = 81) -> dict:
    """All weights of a preset, sharded over so many cards, each with a clip of its own: memory, seconds of a step, and what they are made of.

    `share_of_peak` is assumed, not measured, of all that is computed. Moved are weights in bfloat16, forward and backward, and gradients in
    float32; that, and what waits in main memory, goes on beside the arithmetic, so the longest of the three is the step. Raises UserError
    for unknown names.
    """
    for what, got, known in (("preset", preset, PRESETS), ("card", card, CARDS)):
        if got not in known:
            raise UserError(f"unknown {what}", got=got, expected=", ".join(known))
    config, rows = PRESETS[preset], []
    recipe = FlowMatchingRecipe(task="edit", output_dir="", export="", num_steps=1, start_from="", bf16=True, gradient_checkpointing=True, sharded=True)
    peak = PEAK_TFLOPS[card] * 1e12
    for size, count, offload in product(((832, 480), (1280, 720)), processes, (False, True)):
        layout, recipe = layout_of(size, num_frames), replace(recipe, offload=offload)
        counted, recomputed = training_flops(config, layout), dit_flops(config, layout)
        memory, longest = memory_of(recipe, config, layout.num_tokens, count), longest_sequence(recipe, config, count, CARDS[card])
        moved = (2 + 2 + 4) * weight_bytes(config, 1) * (count - 1) / count
        seconds = {
            "computing": (counted + recomputed) / (peak * share_of_peak),
            "moving": moved / (NVLINK if count <= PER_NODE else INFINIBAND),
            "offloading": 2 * kept_bytes(config, layout.num_tokens, 2) / HOST if offload else 0.0,
        }
        step = max(seconds.values())
        rows.append(
            {
                "size": list(size),
                "frames": num_frames,
                "tokens": layout.num_tokens,
                "cards": count,
                "offload": offload,
                "memory": vars(memory),
                "memory_bytes": memory.total,
                "fits": memory.total + RESERVED <= CARDS[card],
                "flops_counted": counted,
                "flops_recomputed": recomputed,
                "moved_bytes": moved,
                "seconds": seconds,
                "seconds_a_step": step,
                "mfu": counted / peak / step,
                "clips_an_hour": 3600 * count / step,
                "longest_sequence": longest,
                "frames_of_it": frames_of(size, longest),
            }
        )
    return {
        "preset": preset,
        "card": card,
        "card_bytes": CARDS[card],
        "peak_flops": peak,
        "assumed_share_of_peak": share_of_peak,
        "assumed_bytes_a_second": {"within_a_node": NVLINK, "between_nodes": INFINIBAND, "main_memory": HOST},
        "rows": rows,
    }


def kept_bytes(config: MiVEConfig, num_tokens: int, itemsize: int) -> int:
    """Of all blocks' inputs."""
    return config.num_blocks * num_tokens * config.width * itemsize


def longest_sequence(recipe: FlowMatchingRecipe, config: MiVEConfig, num_processes: int, card_bytes: float) -> int:
    """The most tokens that fit one card: from there on a sequence has to be spread over several."""
    none, many = (memory_of(recipe, config, tokens, num_processes).total for tokens in (0, 10_000))
    return max(int((card_bytes - RESERVED - none) / (many - none) * 10_000), 0)


def frames_of(size: tuple[int, int], num_tokens: int) -> int:
    """Pixel frames, 4n+1, of the longest clip of that size that makes so many tokens; 0 where none does."""
    frames = 0
    while layout_of(size, frames + (4 if frames else 1)).num_tokens <= num_tokens:
        frames += 4 if frames else 1
    return frames
