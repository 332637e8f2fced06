"""Estimates of training cost from shapes alone: memory per device, seconds per step, bytes moved.

All estimates assume gradient checkpointing. N tokens per sequence, D width of the DiT, F inner width of its feed-forward layers, P blocks.
"""

import math
from dataclasses import dataclass, replace
from itertools import product

from ..config import PRESETS, MiVEConfig, latent_grid
from ..cost.flops import Layout, dit_flops, training_flops
from ..cost.memory import weight_bytes
from ..errors import UserError
from ..formats.checkpoint import state_dict_shapes
from ..formats.untrained import NEW_PARTS
from .flow_matching import DTYPES, FlowMatchingRecipe
from .throughput import PEAK_TFLOPS

# (itemsize of the compute dtype, whether weights have gradients) -> bytes per element of (N, D) and of (N, F) that one block's activations
# take in its backward pass; counted, see tests. The kept input of each block, (N, D), comes on top.
ACTIVATION_SIZES = {(2, True): (45, 5), (2, False): (29, 7), (4, True): (69, 10), (4, False): (48, 14)}
GATHERED_BLOCKS = 3  # blocks whose full weights are held at once when sharded: the running one, the prefetched one, and one block of gradients
RESERVED = 1e9  # bytes reserved for the system
CARDS = {"H100": 80e9, "A100": 80e9, "RTX 4090": 24e9, "RTX 3090": 24e9}  # bytes of GPU memory
GPUS_PER_NODE = 8
NVLINK, INFINIBAND, HOST = 450e9, 50e9, 50e9  # bytes per second, GPU and direction: within a node, between nodes, to main memory
ADAM_MOMENTS, ADAM_8BIT_BYTES = 2, 2  # number of moments, each of the weights' dtype; bytes per weight of both moments in 8 bits


@dataclass(frozen=True)
class Memory:
    """Bytes per device."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    in_flight: int  # gathered weights of blocks, if sharded

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def training_memory(recipe: FlowMatchingRecipe, config: MiVEConfig, num_tokens: int, num_processes: int = 1, untrained: bool = False) -> Memory:
    """Estimates the memory of a recipe for sequences of N tokens; `untrained`: its checkpoint's new parts have not learnt yet.

    Raises UserError for recipes without gradient checkpointing.
    """
    if not recipe.gradient_checkpointing:
        raise UserError("memory is counted where blocks are recomputed", where="gradient_checkpointing", got=False)
    itemsize = DTYPES[getattr(recipe, "weight_dtype", "fp32")].itemsize
    frozen = weight_bytes(config, itemsize, 1 if getattr(recipe, "float8", "") == "kept" else None)
    whole = new_parts_size(config) if recipe.trains_new_parts(untrained) else 0
    trained = (lora_size(config, recipe.lora_rank) + whole) * 4 if recipe.lora_rank else frozen
    num_shards = num_processes if recipe.sharded else 1
    compute_itemsize = 2 if recipe.bf16 else 4
    rows = recipe.batch_size * num_tokens
    kept = 0 if recipe.offload else block_input_bytes(config, rows, compute_itemsize)
    per_width, per_ffn_width = ACTIVATION_SIZES[compute_itemsize, not recipe.lora_rank]
    optimizer = trained * ADAM_MOMENTS if recipe.optimizer == "adamw" else trained // (4 if recipe.lora_rank else itemsize) * ADAM_8BIT_BYTES
    return Memory(
        weights=(frozen // num_shards) + (trained - whole * itemsize if recipe.lora_rank else 0),
        gradients=trained // num_shards,
        optimizer=optimizer // num_shards,
        averages=trained // num_shards if recipe.ema_decay else 0,
        activations=kept + rows * (per_width * config.width + per_ffn_width * config.ffn_width),
        in_flight=GATHERED_BLOCKS * block_size(config) * compute_itemsize if recipe.sharded else 0,
    )


def block_size(config: MiVEConfig) -> int:
    """Returns the number of weights of one block."""
    return sum(math.prod(shape) for key, shape in state_dict_shapes(replace(config, num_blocks=1)).items() if key.startswith("blocks."))


def new_parts_size(config: MiVEConfig) -> int:
    """Returns the number of weights of the parts that Wan lacks."""
    return sum(math.prod(shape) for key, shape in state_dict_shapes(replace(config, num_blocks=1)).items() if key.split(".", 1)[0] in NEW_PARTS)


def lora_size(config: MiVEConfig, rank: int) -> int:
    """Returns the number of weights of a LoRA on all six layers of each block."""
    return config.num_blocks * rank * (4 * 2 * config.width + 2 * (config.width + config.ffn_width))


def clip_layout(size: tuple[int, int], num_frames: int, config: MiVEConfig = PRESETS["14b"]) -> Layout:
    """(width, height) and frames -> sequence layout; as in the paper, a twentieth of the tokens are condition tokens."""
    grid = config.patch_grid(*latent_grid(num_frames, size[1], size[0]))
    return Layout((grid[0] + 1) * grid[1] * grid[2] // 19, grid)


def scaling_report(
    preset: str = "14b", *, card: str = "H100", share_of_peak: float = 0.45, processes: tuple[int, ...] = (8, 32, 128), num_frames: int = 81
) -> dict:
    """Estimates full training of a preset, sharded over numbers of GPUs with one clip each: memory and seconds per step, with their parts.

    `share_of_peak` is the assumed (not measured) utilisation for all FLOPs, including recomputation. Moved bytes are weights in bfloat16 for
    forward and backward pass, and gradients in float32. Communication and offloading overlap with computation, so a step takes the longest
    of the three. Raises UserError for unknown names.
    """
    for what, got, known in (("preset", preset, PRESETS), ("card", card, CARDS)):
        if got not in known:
            raise UserError(f"unknown {what}", got=got, expected=", ".join(known))
    config, rows = PRESETS[preset], []
    recipe = FlowMatchingRecipe(task="edit", output_dir="", export="", num_steps=1, start_from="", bf16=True, gradient_checkpointing=True, sharded=True)
    peak = PEAK_TFLOPS[card] * 1e12
    for size, num_gpus, offload in product(((832, 480), (1280, 720)), processes, (False, True)):
        layout, recipe = clip_layout(size, num_frames, config), replace(recipe, offload=offload)
        model_flops, recomputed_flops = training_flops(config, layout), dit_flops(config, layout)
        memory, longest = training_memory(recipe, config, layout.num_tokens, num_gpus), longest_sequence(recipe, config, num_gpus, CARDS[card])
        moved_bytes = (2 + 2 + 4) * weight_bytes(config, 1) * (num_gpus - 1) / num_gpus
        seconds = {
            "computing": (model_flops + recomputed_flops) / (peak * share_of_peak),
            "moving": moved_bytes / (NVLINK if num_gpus <= GPUS_PER_NODE else INFINIBAND),
            "offloading": 2 * block_input_bytes(config, layout.num_tokens, 2) / HOST if offload else 0.0,
        }
        step = max(seconds.values())
        rows.append(
            {
                "size": list(size),
                "frames": num_frames,
                "tokens": layout.num_tokens,
                "cards": num_gpus,
                "offload": offload,
                "memory": vars(memory),
                "memory_bytes": memory.total,
                "fits": memory.total + RESERVED <= CARDS[card],
                "flops_counted": model_flops,
                "flops_recomputed": recomputed_flops,
                "moved_bytes": moved_bytes,
                "seconds": seconds,
                "seconds_a_step": step,
                "mfu": model_flops / peak / step,
                "clips_an_hour": 3600 * num_gpus / step,
                "longest_sequence": longest,
                "frames_of_it": max_frames(size, longest, config),
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


def block_input_bytes(config: MiVEConfig, num_tokens: int, itemsize: int) -> int:
    """Returns the bytes of all blocks' inputs, which gradient checkpointing keeps."""
    return config.num_blocks * num_tokens * config.width * itemsize


def longest_sequence(recipe: FlowMatchingRecipe, config: MiVEConfig, num_processes: int, card_bytes: float) -> int:
    """Returns the maximum number of tokens that fit one GPU; longer sequences need several."""
    empty, filled = (training_memory(recipe, config, tokens, num_processes).total for tokens in (0, 10_000))
    return max(int((card_bytes - RESERVED - empty) / (filled - empty) * 10_000), 0)


def max_frames(size: tuple[int, int], num_tokens: int, config: MiVEConfig = PRESETS["14b"]) -> int:
    """Returns the number of pixel frames, 4n+1, of the longest clip of that size within so many tokens; 0 if none fits."""
    frames = 0
    while clip_layout(size, frames + (4 if frames else 1), config).num_tokens <= num_tokens:
        frames += 4 if frames else 1
    return frames
