"""What a recipe will take, before anything is loaded: sequences, trained weights, memory, time and disk, all computed by budget.py from shapes alone."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import PRESETS, SPATIAL_FACTOR, TEMPORAL_FACTOR, VLM_SIZES, MiVEConfig
from ..cost.flops import Layout
from ..cost.memory import weight_bytes
from ..errors import UserError
from ..formats.checkpoint import read_config
from ..formats.safetensors_file import resolve
from ..formats.untrained import NEW_PARTS, untrained_parts
from ..media.fit import edit_size
from ..pipeline import EMBEDDED
from .budget import (
    CARDS,
    GPUS_PER_NODE,
    RESERVED,
    SHARE_OF_PEAK,
    Memory,
    checkpoint_bytes,
    clip_layout,
    export_bytes,
    offloaded_bytes,
    pair_bytes,
    step_seconds,
    trained_parts,
    training_memory,
)
from .cache import INDEX, STATE_DTYPES, read_index
from .edit_task import EditRecipe, check_edit_recipe
from .recipe import parse_recipe
from .tasks import read_task
from .throughput import PEAK_TFLOPS

NUM_PAIRS = 1000  # assumed where no cache says how many
EDIT_SHAPE = (8320, 4800)  # width and height whose shape an unnamed size has: 832x480


@dataclass(frozen=True)
class PlanOptions:
    """What a recipe leaves open."""

    preset: str = ""  # plan for this size of Wan instead of the checkpoint start_from, which need not exist
    vlm: str = "8b"  # the Qwen3-VL that a preset reads
    buckets: tuple[tuple[int, int, int], ...] = ()  # (width, height, frames) in place of those of the caches
    states: str = ""  # dtype of the cached VLM states; "": that of the caches, or bf16
    num_pairs: int = 0  # cached pairs; 0: those of the caches, or NUM_PAIRS
    card: str = ""  # "": the smallest of CARDS that it fits; none for a recipe that trains on a CPU
    num_cards: int = 0  # 0: one, or eight where the recipe is sharded
    share_of_peak: float = SHARE_OF_PEAK


@dataclass(frozen=True)
class Sequences:
    """The sequences that a recipe trains on."""

    counts: dict[Layout, int]  # number of pairs of each layout
    num_negative: int  # most tokens of a cached empty instruction
    states: str
    named_by: str


def plan(recipe_path: str | Path, options: PlanOptions = PlanOptions()) -> dict:
    """Returns the plan of a recipe of the task `edit`, as JSON values. Reads the checkpoint's header and the caches' indices, no weights.

    Raises UserError for an invalid recipe, and for a checkpoint that does not exist if no preset stands in for it.
    """
    recipe = parse_recipe(EditRecipe, read_task(recipe_path), recipe_path)
    check_edit_recipe(recipe, recipe_path)
    config, start, untrained = find_start(recipe, options)
    sequences = find_sequences(recipe, config, options)
    longest = max(layout.num_tokens for layout in sequences.counts)
    num_cards = options.num_cards or (GPUS_PER_NODE if recipe.sharded else 1)
    memory = training_memory(recipe, config, longest, num_cards, bool(untrained)) if recipe.gradient_checkpointing else None
    card = options.card or default_card(recipe, memory)
    num_pairs = options.num_pairs or (sum(sequences.counts.values()) if sequences.named_by == "caches" else NUM_PAIRS)
    parts = trained_parts(recipe, config, bool(untrained))
    checkpoint = checkpoint_bytes(recipe, config, bool(untrained))
    cached = mean({layout: pair_bytes(config, layout, sequences.states, sequences.num_negative) for layout in sequences.counts}, sequences.counts)
    return {
        "recipe": str(recipe_path),
        "model": {
            "start": start,
            "width": config.width,
            "blocks": config.num_blocks,
            "parameters": weight_bytes(config, 1),
            "vlm": config.vlm,
            "layers": list(config.layers),
            "untrained": list(untrained),
        },
        "sequences": describe(sequences.counts, config),
        "sequences_named_by": sequences.named_by,
        "trained": {"parts": parts, "total": sum(parts.values())},
        "memory": {**vars(memory), "total": memory.total, "reserved": int(RESERVED)} if memory else None,
        "main_memory": {"blocks_inputs": offloaded_bytes(recipe, config, longest), "checkpoint_while_saved": checkpoint},
        "card": {"name": card, "number": num_cards, "bytes": CARDS[card], "fits": memory is not None and memory.total + RESERVED <= CARDS[card]}
        if card
        else None,
        "time": training_time(recipe, config, sequences, card, num_cards, options.share_of_peak, bool(untrained)) if card else None,
        "disk": {
            "states": sequences.states,
            "cache_bytes_a_pair": round(cached),
            "pairs": num_pairs,
            "cache_bytes": round(cached * num_pairs),
            "checkpoint_bytes": checkpoint,
            "checkpoints_kept": recipe.num_checkpoints,
            "output_dir_bytes": (recipe.num_checkpoints + 1) * checkpoint,  # a new one is written before the oldest goes
            "export_bytes": export_bytes(recipe, config, bool(untrained)),
        },
    }


def find_start(recipe: EditRecipe, options: PlanOptions) -> tuple[MiVEConfig, str, tuple[str, ...]]:
    """Returns the config of the checkpoint to train, its name and its untrained modules. Raises UserError if there is neither a checkpoint nor a preset."""
    if options.preset:
        config, (vlm_width, vlm_layers) = PRESETS[options.preset], VLM_SIZES[options.vlm]
        if options.preset != "tiny":
            config = replace(config, vlm=f"Qwen3-VL-{options.vlm.upper()}", vlm_width=vlm_width, vlm_num_layers=vlm_layers)
        return config, f"a {options.preset} Wan, converted", NEW_PARTS
    start = Path(EMBEDDED.get(recipe.start_from, recipe.start_from))
    if not start.exists():
        quantized = recipe.float8 == "kept"
        made = f"`mive init-from-wan WAN {'models/dit.safetensors' if quantized else start}`" + (
            f" and `mive quantize models/dit.safetensors {start}` make it" if quantized else " makes it"
        )
        raise UserError("no such checkpoint", where=f"start_from {str(start)!r}", fix=f"{made}; `--preset 14b` or `--preset 1.3b` plans without it")
    path = resolve(start, "dit.safetensors")
    return read_config(path), str(recipe.start_from), untrained_parts(path)


def find_sequences(recipe: EditRecipe, config: MiVEConfig, options: PlanOptions) -> Sequences:
    """Returns the layouts of the caches; where one is missing, those of the buckets, or of the checkpoint's edit size."""
    indices = [read_index(folder) for folder in recipe.caches if (Path(folder) / INDEX).is_file()]
    if not options.buckets and len(indices) == len(recipe.caches):
        entries = [entry for index in indices for entry in index["entries"]]
        counts = Counter(Layout(entry.num_tokens, config.patch_grid(*entry.grid), entry.num_references) for entry in entries)
        states = options.states or indices[0]["contract"]["states"]
        return Sequences(dict(counts), max(entry.num_negative for entry in entries), states, "caches")
    buckets = options.buckets or ((*edit_size(EDIT_SHAPE, config.edit_pixels), config.edit_frames),)
    counts = Counter(clip_layout((width, height), frames, config) for width, height, frames in buckets)
    num_negative = max(layout.num_condition for layout in counts) if recipe.condition_dropout else 0
    return Sequences(dict(counts), num_negative, options.states or next(iter(STATE_DTYPES)), "--bucket" if options.buckets else "the model's edit size")


def default_card(recipe: EditRecipe, memory: Memory | None) -> str:
    """Returns the smallest card that the recipe fits, the slower one of two; the largest if it fits none, and "" for a recipe that trains on a CPU."""
    if recipe.device == "cpu":
        return ""
    by_size = sorted(CARDS, key=lambda card: (CARDS[card], PEAK_TFLOPS[card]))
    return next((card for card in by_size if memory and memory.total + RESERVED <= CARDS[card]), by_size[-1])


def training_time(recipe: EditRecipe, config: MiVEConfig, sequences: Sequences, card: str, num_cards: int, share_of_peak: float, untrained: bool) -> dict:
    """Returns the seconds of a mean step, by what they are spent on, and the hours of all steps; validations and the cache come on top."""
    steps = {layout: step_seconds(recipe, config, layout, card, num_cards, share_of_peak, untrained) for layout in sequences.counts}
    seconds = mean({layout: max(parts.values()) for layout, parts in steps.items()}, sequences.counts)
    return {
        "peak_flops": PEAK_TFLOPS[card] * 1e12,
        "assumed_share_of_peak": share_of_peak,
        "seconds": {name: mean({layout: parts[name] for layout, parts in steps.items()}, sequences.counts) for name in next(iter(steps.values()))},
        "seconds_a_step": seconds,
        "pairs_a_step": recipe.batch_size * recipe.gradient_accumulation_steps * num_cards,
        "steps": recipe.num_steps,
        "hours": recipe.num_steps * seconds / 3600,
    }


def mean(values: dict[Layout, float], counts: dict[Layout, int]) -> float:
    """Mean over the pairs."""
    return sum(values[layout] * count for layout, count in counts.items()) / sum(counts.values())


def describe(counts: dict[Layout, int], config: MiVEConfig) -> list[dict]:
    """The longest sequence of each size as JSON values; its pixels follow from the grid."""
    longest: dict[tuple, Layout] = {}
    num_pairs: Counter = Counter()
    for layout, count in counts.items():
        size = layout.grid, layout.num_references
        longest[size] = max(longest.get(size, layout), layout, key=lambda one: one.num_tokens)
        num_pairs[size] += count
    described = []
    for size, layout in longest.items():
        frames, rows, columns = (patches * side for patches, side in zip(layout.grid, config.patch_size))
        described.append(
            {
                "size": [SPATIAL_FACTOR * columns, SPATIAL_FACTOR * rows],
                "frames": TEMPORAL_FACTOR * (frames - 1) + 1,
                "references": layout.num_references,
                "tokens": layout.num_tokens,
                "condition_tokens": layout.num_condition,
                "pairs": num_pairs[size],
            }
        )
    return described


def describe_plan(report: dict) -> str:
    """A plan as lines of text."""
    return "".join(f"{name:<17}{text}\n" for name, text in (*model_lines(report), *cost_lines(report)))


def model_lines(report: dict) -> list[tuple[str, str]]:
    """Name and text of the lines about what is trained, on what."""
    model, named_by = report["model"], report["sequences_named_by"]
    lines = [("model", f"{model['start']}: {number(model['parameters'])} parameters, {model['blocks']} blocks of {model['width']}, reads {model['vlm']}")]
    if model["untrained"]:
        lines.append(("untrained in it", ", ".join(model["untrained"])))
    for one in report["sequences"]:
        size = "x".join(map(str, (*one["size"], one["frames"])))
        counted = f"; {one['pairs']} pairs" if named_by == "caches" else f" (assumed: a twentieth); size by {named_by}"
        lines.append(("sequence", f"{size}: {one['tokens']} tokens, {one['condition_tokens']} of them condition tokens{counted}"))
    parts = ", ".join(f"{name} {number(count)}" for name, count in report["trained"]["parts"].items())
    return [*lines, ("trained weights", f"{number(report['trained']['total'])}: {parts}")]


def cost_lines(report: dict) -> list[tuple[str, str]]:
    """Name and text of the lines about memory, time and disk."""
    memory, card, time, disk = (report[name] for name in ("memory", "card", "time", "disk"))
    on_card, hours = "not estimated: it is counted where blocks are recomputed (gradient_checkpointing: true)", "not estimated for a CPU; --card names a card"
    if memory:
        parts = ", ".join(f"{name.replace('_', ' ')} {gigabytes(value)}" for name, value in memory.items() if name != "total" and value)
        on_card = f"{gigabytes(memory['total'] + memory['reserved'])}: {parts}"
    if time:
        hours = (
            f"{time['hours']:.3g} hours for {time['steps']} steps of {time['pairs_a_step']} pairs, {time['seconds_a_step']:.3g} s each, if "
            f"{time['assumed_share_of_peak']:.0%} of the peak of {time['peak_flops'] / 1e12:.0f} TFLOPS is reached (assumed, not measured)"
        )
    inputs, saved = (report["main_memory"][name] for name in ("blocks_inputs", "checkpoint_while_saved"))
    lines = [
        ("memory of a card", on_card),
        ("main memory", (f"{gigabytes(inputs)} of blocks' inputs, " if inputs else "") + f"{gigabytes(saved)} while a checkpoint is saved"),
    ]
    if card:
        fits = "" if not memory else ": the memory fits" if card["fits"] else ": THE MEMORY DOES NOT FIT"
        lines.append(("cards", f"{card['number']} x {card['name']}, {gigabytes(card['bytes'])}{fits}"))
    kept, finished = gigabytes(disk["output_dir_bytes"]), gigabytes(disk["export_bytes"])
    return [
        *lines,
        ("time", hours),
        ("cache", f"{gigabytes(disk['cache_bytes_a_pair'])} a pair with {disk['states']} states, {gigabytes(disk['cache_bytes'])} for {disk['pairs']} pairs"),
        ("checkpoints", f"{gigabytes(disk['checkpoint_bytes'])} each, {kept} at most; the finished model takes {finished}"),
    ]


def number(count: int) -> str:
    """149_000_000 -> 149 million."""
    for size, name in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= size:
            return f"{count / size:.3g}{name}"
    return str(count)


def gigabytes(num_bytes: float) -> str:
    """1.234e9 -> 1.23 GB; less than a gigabyte in MB."""
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"
