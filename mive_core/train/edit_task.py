"""The task `edit`: training of a DiT, or a LoRA on one, on cached pairs.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..config import MiVEConfig
from ..errors import UserError
from ..formats.checkpoint import load_dit, read_config
from ..formats.safetensors_file import resolve
from ..formats.untrained import NEW_PARTS, untrained_parts
from ..pipeline import EMBEDDED
from .cache import CacheEntry, dequantize_states, read_index
from .flow_matching import DTYPES, FlowMatchingRecipe, FlowMatchingTask, check_recipe, training_attention
from .loop import step_seed
from .objective import EditFeatures, collate
from .recipe import parse_recipe

OPEN_SHARDS = 8  # maximum number of shards kept open
WEIGHT_DTYPES = ("fp32", "bf16")
FLOAT8 = ("scaled_back", "kept")


@dataclass(frozen=True, kw_only=True)
class EditRecipe(FlowMatchingRecipe):
    """Recipe of a training on cached pairs."""

    caches: tuple[str, ...]  # folders that `mive data cache` made for the checkpoint start_from
    weight_dtype: str = "fp32"  # dtype of the loaded weights, fp32 or bf16; weights of the LoRA are always float32
    float8: str = "scaled_back"  # treatment of the checkpoint's 8-bit matrices: scaled_back to weight_dtype, or kept in 8 bits, for a LoRA only
    condition_dropout: float = 0.0  # probability of an empty instruction for a batch, for classifier-free guidance


class CachedBatches(Dataset):
    """dataset[n] is the n-th batch: each epoch visits every pair once, in a new order, in batches of one shape.

    The last batch of a shape is filled up with its first pairs. Tensors are read from disk on access.
    """

    def __init__(self, folders: tuple[str, ...], batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.shapes: dict[tuple, list[tuple[str, CacheEntry]]] = {}
        for folder in folders:
            for entry in read_index(folder)["entries"]:
                self.shapes.setdefault((entry.grid, entry.num_tokens, entry.num_negative, entry.num_references), []).append((folder, entry))
        self.num_batches = sum(-(-len(group) // batch_size) for group in self.shapes.values())
        self._epoch: tuple[int, list] = (-1, [])
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def order(self, epoch: int) -> list[list[tuple[str, CacheEntry]]]:
        """Returns the batches of an epoch, each a list of (folder, entry)."""
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(step_seed(self.seed, epoch))
            batches = []
            for _, group in sorted(self.shapes.items()):
                shuffled = [group[i] for i in torch.randperm(len(group), generator=generator)]
                for first in range(0, len(group), self.batch_size):
                    batches.append([shuffled[(first + i) % len(group)] for i in range(self.batch_size)])
            self._epoch = epoch, [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return self._epoch[1]

    def __getitem__(self, index: int) -> EditFeatures:
        """Reads a batch; `negative` is set if its pairs were cached with it."""
        epoch, place = divmod(index, self.num_batches)
        read = [self.read(folder, entry) for folder, entry in self.order(epoch)[place]]
        return collate([EditFeatures(**features) for features in read])

    def read(self, folder: str, entry: CacheEntry) -> dict[str, Tensor]:
        """Reads the features of one pair in float32. Raises UserError if the shard is missing or damaged."""
        path = Path(folder) / entry.shard
        try:
            file = self._file(path)
            names = [key for key in file.keys() if key.startswith(f"{entry.key}.")]
            tensors = {key.split(".", 1)[1]: file.get_tensor(key) for key in names}
        except (OSError, SafetensorError) as error:
            raise UserError(
                "a shard of the cache cannot be read", where=path, got=str(error), fix="run `mive data cache` again: only what is missing is computed"
            ) from None
        if "target" not in tensors:
            raise UserError("a shard of the cache lacks a pair", where=path, got=f"no {entry.key}", fix="run `mive data cache` again")
        states = {name: dequantize_states(name, tensors) for name in ("states", "negative") if name in tensors}
        others = ("target", "source", "reference", "mask", "reference_frames")
        return {name: tensors[name].float() for name in others if name in tensors} | states

    def _file(self, path: Path) -> Any:
        """Returns the open shard; the least recently used one is closed above OPEN_SHARDS."""
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


class EditTask(FlowMatchingTask):
    """Trains a checkpoint on the batches of its caches."""

    recipe: EditRecipe

    def __init__(self, recipe: EditRecipe, where: object = None):
        check_recipe(recipe, where)
        check_edit_recipe(recipe, where)
        path = resolve(EMBEDDED.get(recipe.start_from, recipe.start_from), "dit.safetensors")
        check_caches(recipe, read_config(path))
        untrained = bool(untrained_parts(path))
        precise = NEW_PARTS if recipe.trains_new_parts(untrained) else ()
        torch.manual_seed(recipe.seed)
        model = load_dit(
            path, attention=training_attention(recipe), dtype=DTYPES[recipe.weight_dtype], device=recipe.device, float8=recipe.float8, precise=precise
        )
        super().__init__(recipe, model.train(), CachedBatches(recipe.caches, recipe.batch_size, recipe.seed), untrained=untrained)

    def states(self, batch: EditFeatures, generator: torch.Generator) -> Tensor:
        """Returns the states of the instruction, or by condition dropout those of an empty one."""
        dropped = torch.rand((), generator=generator) < self.recipe.condition_dropout
        return batch.negative if dropped else batch.states


def check_edit_recipe(recipe: EditRecipe, where: object) -> None:
    """Raises UserError for invalid values of EditRecipe's own fields."""
    for name, known in (("weight_dtype", WEIGHT_DTYPES), ("float8", FLOAT8)):
        if getattr(recipe, name) not in known:
            raise UserError(f"the recipe's {name} is unknown", where=where, got=repr(getattr(recipe, name)), expected=" or ".join(known))
    if recipe.float8 == "kept" and not recipe.lora_rank:
        raise UserError("weights in 8 bits are not trained", where=where, fix="set lora_rank, or float8 to scaled_back")
    if recipe.weight_dtype == "bf16" and not recipe.bf16:
        raise UserError("weights in bf16 are computed with in bf16", where=where, fix="set bf16 to true")
    if not recipe.caches:
        raise UserError("the recipe names no cache", where=where, fix="`mive data cache` makes one")


def check_cache(folder: str, config: MiVEConfig) -> dict:
    """Returns the contract of a cache. Raises UserError unless it was made for the checkpoint's layers, VLM and latent format."""
    contract = read_index(folder)["contract"]
    for key, wanted in (
        ("layers", list(config.resolved_layers)),
        ("vlm_width", config.vlm_width),
        ("vlm_num_layers", config.vlm_num_layers),
        ("latent_format", config.latent_format),
    ):
        if contract.get(key) != wanted:
            raise UserError(
                f"the cache was made for other {key}",
                where=folder,
                got=contract.get(key),
                expected=wanted,
                fix="run `mive data cache` with the checkpoint that is to be trained",
            )
    return contract


def check_caches(recipe: EditRecipe, config: MiVEConfig) -> None:
    """Raises UserError if a cache does not fit the checkpoint or the first cache, or lacks the empty instruction for condition dropout."""
    contracts = {folder: check_cache(folder, config) for folder in filter(None, (*recipe.caches, recipe.validation_cache))}
    for folder, contract in contracts.items():
        expected = contracts[recipe.caches[0]]["models"]
        if contract["models"] != expected:
            raise UserError(
                "the cache was made by another VAE or VLM than the first one",
                where=folder,
                got=f"models {contract['models']}",
                expected=f"{expected}, as {recipe.caches[0]}",
                fix="run `mive data cache` with the same models for all",
            )
        if recipe.condition_dropout and folder in recipe.caches and not contract.get("negative"):
            raise UserError(
                "condition_dropout needs the states of an empty instruction", where=folder, fix="run `mive data cache --negative` into another folder"
            )


def build(values: dict, where: object = None) -> EditTask:
    """Builds the task from the values of a recipe. `where` names the recipe in messages. Raises UserError."""
    return EditTask(parse_recipe(EditRecipe, values, where), where)
