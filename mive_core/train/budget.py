"""Estimates of training cost from shapes alone: memory per device, seconds per step, bytes moved and stored.

Memory is estimated with gradient checkpointing. N tokens per sequence, D width of the DiT, F inner width of its feed-forward layers, P blocks.
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
from .lora import TARGETS
from .throughput import PEAK_TFLOPS

# (itemsize of the compute dtype, whether weights have gradients) -> bytes per element of (N, D) and of (N, F) that one block's activations
# take in its backward pass; counted, see tests. The kept input of each block, (N, D), comes on top.
ACTIVATION_SIZES = {(2, True): (45, 5), (2, False): (29, 7), (4, True): (69, 10), (4, False): (48, 14)}
GATHERED_BLOCKS = 3  # blocks whose full weights are held at once when sharded: the running one, the prefetched one, and one block of gradients
RESERVED = 1e9  # bytes reserved for the system
CARDS = {"H100": 80e9, "A100": 80e9, "RTX 4090": 24e9, "RTX 3090": 24e9, "RTX 4080": 16e9}  # bytes of GPU memory
SHARE_OF_PEAK = 0.45  # assumed, not measured: of the card's peak, for all operations that are computed
LORA_ITEMSIZE = 4  # trained beside frozen weights: float32
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
    frozen, trained = model_bytes(recipe, config), trained_bytes(recipe, config, untrained)
    whole = new_parts_size(config) if recipe.trains_new_parts(untrained) else 0
    num_shards = num_processes if recipe.sharded else 1
    compute_itemsize = 2 if recipe.bf16 else 4
    rows = recipe.batch_size * num_tokens
    kept = 0 if recipe.offload else block_input_bytes(config, rows, compute_itemsize)
    per_width, per_ffn_width = ACTIVATION_SIZES[compute_itemsize, not recipe.lora_rank]
    return Memory(
        weights=(frozen // num_shards) + (trained - whole * _itemsize(recipe) if recipe.lora_rank else 0),
        gradients=trained // num_shards,
        optimizer=optimizer_bytes(recipe, config, untrained) // num_shards,
        averages=trained // num_shards if recipe.ema_decay else 0,
        activations=kept + rows * (per_width * config.width + per_ffn_width * config.ffn_width),
        in_flight=GATHERED_BLOCKS * block_size(config) * compute_itemsize if recipe.sharded else 0,
    )


def trained_parts(recipe: FlowMatchingRecipe, config: MiVEConfig, untrained: bool = False) -> dict[str, int]:
    """Returns the number of trained weights by part: a LoRA's adapters by layer of a block, or the modules of the DiT."""
    modules: dict[str, int] = {}
    for key, shape in state_dict_shapes(config).items():
        name = key.split(".")[0]
        name = "time" if name.startswith("time_") else name
        modules[name] = modules.get(name, 0) + math.prod(shape)
    if not recipe.lora_rank:
        return modules
    adapters = {target: lora_size(config, recipe.lora_rank, (target,)) for target in recipe.lora_targets}
    return adapters | ({name: modules[name] for name in NEW_PARTS} if recipe.trains_new_parts(untrained) else {})


def model_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig) -> int:
    """Returns the bytes of the DiT's weights in all processes together, without what is trained beside them."""
    return weight_bytes(config, _itemsize(recipe), 1 if getattr(recipe, "float8", "") == "kept" else None)


def trained_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig, untrained: bool = False) -> int:
    """Returns the bytes of the trained weights in all processes together."""
    if not recipe.lora_rank:
        return model_bytes(recipe, config)
    return sum(trained_parts(recipe, config, untrained).values()) * LORA_ITEMSIZE


def optimizer_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig, untrained: bool = False) -> int:
    """Returns the bytes of the optimizer's moments in all processes together."""
    trained = trained_bytes(recipe, config, untrained)
    if recipe.optimizer == "adamw":
        return trained * ADAM_MOMENTS
    return trained // (LORA_ITEMSIZE if recipe.lora_rank else _itemsize(recipe)) * ADAM_8BIT_BYTES


def checkpoint_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig, untrained: bool = False) -> int:
    """Returns the bytes of a checkpoint in output_dir: trained weights, their averages and the optimizer's moments."""
    trained = trained_bytes(recipe, config, untrained)
    return trained * (2 if recipe.ema_decay else 1) + optimizer_bytes(recipe, config, untrained)


def export_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig, untrained: bool = False) -> int:
    """Returns the bytes of the finished model, a whole DiT or a LoRA."""
    if recipe.lora_rank:
        return trained_bytes(recipe, config, untrained)
    return weight_bytes(config, DTYPES[recipe.export_dtype].itemsize if recipe.export_dtype else _itemsize(recipe))


def _itemsize(recipe: FlowMatchingRecipe) -> int:
    """Bytes per number of the loaded weights."""
    return DTYPES[getattr(recipe, "weight_dtype", "fp32")].itemsize


def offloaded_bytes(recipe: FlowMatchingRecipe, config: MiVEConfig, num_tokens: int) -> int:
    """Returns the bytes of the blocks' inputs that wait in main memory, per device."""
    return block_input_bytes(config, recipe.batch_size * num_tokens, 2 if recipe.bf16 else 4) if recipe.offload else 0


def pair_bytes(config: MiVEConfig, layout: Layout, states: str = "bf16", num_negative: int = 0) -> int:
    """Returns the bytes of a pair in a cache; `num_negative`: tokens of the empty instruction, if it is stored. See cache.Encoders.features."""
    frames, rows, columns = (patches * side for patches, side in zip(layout.grid, config.patch_size))
    latents = (2 * frames + layout.num_references) * rows * columns * config.latent_channels * 2
    per_token = config.vlm_width + 4 if states == "fp8" else 2 * config.vlm_width  # in 8 bits with one float32 scale
    mask = frames * rows * columns * 2
    return latents + mask + (layout.num_condition + num_negative) * len(config.layers) * per_token


def block_size(config: MiVEConfig) -> int:
    """Returns the number of weights of one block."""
    return sum(math.prod(shape) for key, shape in state_dict_shapes(replace(config, num_blocks=1)).items() if key.startswith("blocks."))


def new_parts_size(config: MiVEConfig) -> int:
    """Returns the number of weights of the parts that Wan lacks."""
    return sum(math.prod(shape) for key, shape in state_dict_shapes(replace(config, num_blocks=1)).items() if key.split(".", 1)[0] in NEW_PARTS)


def lora_size(config: MiVEConfig, rank: int, targets: tuple[str, ...] = TARGETS) -> int:
    """Returns the number of weights of a LoRA on these layers of each block."""
    shapes = state_dict_shapes(replace(config, num_blocks=1))
    return config.num_blocks * rank * sum(sum(shapes[f"blocks.0.{target}.weight"]) for target in targets)


def clip_layout(size: tuple[int, int], num_frames: int, config: MiVEConfig = PRESETS["14b"]) -> Layout:
    """(width, height) and frames -> sequence layout; as in the paper, a twentieth of the tokens are condition tokens."""
    grid = config.patch_grid(*latent_grid(num_frames, size[1], size[0]))
    return Layout((grid[0] + 1) * grid[1] * grid[2] // 19, grid)


def step_seconds(
    recipe: FlowMatchingRecipe,
    config: MiVEConfig,
    layout: Layout,
    card: str,
    num_processes: int = 1,
    share_of_peak: float = SHARE_OF_PEAK,
    untrained: bool = False,
) -> dict[str, float]:
    """Estimates the seconds of one step, by what they are spent on. The three overlap, so a step takes the longest of them.

    `share_of_peak` is the assumed (not measured) utilisation for all FLOPs, including recomputation. Moved bytes of sharded training are
    weights in bfloat16 for forward and backward pass, and gradients in float32.
    """
    num_pairs = recipe.gradient_accumulation_steps * recipe.batch_size
    extra = int(recipe.gradient_checkpointing) + recipe.scheduled_sampling_ratio  # forward passes: recomputation and one-step predictions
    trained = training_flops(config, layout, frozen=bool(recipe.lora_rank), new_parts=recipe.trains_new_parts(untrained))
    flops = num_pairs * (trained + extra * dit_flops(config, layout))
    moved = recipe.gradient_accumulation_steps * (2 + 2 + 4) * weight_bytes(config, 1) * (num_processes - 1) / num_processes if recipe.sharded else 0.0
    return {
        "computing": flops / (PEAK_TFLOPS[card] * 1e12 * share_of_peak),
        "moving": moved / (NVLINK if num_processes <= GPUS_PER_NODE else INFINIBAND),
        "offloading": 2 * recipe.gradient_accumulation_steps * offloaded_bytes(recipe, config, layout.num_tokens) / HOST,
    }


def scaling_report(
    preset: str = "14b", *, card: str = "H100", share_of_peak: float = SHARE_OF_PEAK, processes: tuple[int, ...] = (8, 32, 128), num_frames: int = 81
) -> dict:
    """Estimates full training of a preset, sharded over numbers of GPUs with one clip each: memory and seconds per step (see step_seconds).

    Raises UserError for unknown names.
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
        seconds = step_seconds(recipe, config, layout, card, num_gpus, share_of_peak)
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
