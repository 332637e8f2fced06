"""Task edit: a DiT trained on cached pairs.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..config import MiVEConfig
from ..errors import UserError
from ..formats.checkpoint import load_dit, read_config
from ..formats.safetensors_file import resolve
from ..pipeline import EMBEDDED
from .cache import CacheEntry, read_index, restored
from .flow_matching import DTYPES, FlowMatchingRecipe, FlowMatchingTask, check, training_attention
from .loop import step_seed
from .objective import EditFeatures, stacked
from .recipe import parse_recipe

OPEN_SHARDS = 8
WEIGHT_DTYPES = ("fp32", "bf16")
FLOAT8 = ("scaled_back", "kept")


@dataclass(frozen=True, kw_only=True)
class EditRecipe(FlowMatchingRecipe):
    """How a DiT is trained on cached pairs."""

    caches: tuple  # folders that `mive data cache` wrote for that checkpoint
    weight_dtype: str = "fp32"  # of what is loaded; a LoRA's own weights are float32
    float8: str = "scaled_back"  # matrices that the checkpoint has in 8 bits; kept: they stay so, under a LoRA
    condition_dropout: float = 0.0  # share of the steps that read the empty instruction, for guidance


class CachedBatches(Dataset):
    """dataset[n] is the n-th batch: each epoch visits every pair once, in an order of its own, batches being of one shape.

    The last batch of a shape is filled from its beginning. Tensors are read when asked for.
    """

    def __init__(self, folders: tuple[str, ...], batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        self.shapes: dict[tuple, list[tuple[str, CacheEntry]]] = {}
        for folder in folders:
            for entry in read_index(folder)["entries"]:
                self.shapes.setdefault((entry.grid, entry.num_tokens, entry.num_negative), []).append((folder, entry))
        self.num_batches = sum(-(-len(group) // batch_size) for group in self.shapes.values())
        self._epoch: tuple[int, list] = (-1, [])
        self._open: OrderedDict = OrderedDict()

    def order(self, epoch: int) -> list[list[tuple[str, CacheEntry]]]:
        """The batches of an epoch."""
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
        """With the states of an empty instruction where its pairs have them."""
        epoch, place = divmod(index, self.num_batches)
        read = [self.read(folder, entry) for folder, entry in self.order(epoch)[place]]
        return stacked([EditFeatures(**features) for features in read])

    def read(self, folder: str, entry: CacheEntry) -> dict[str, Tensor]:
        """One pair's features in float32. Raises UserError where the shard is gone or damaged."""
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
        states = {name: restored(name, tensors) for name in ("states", "negative") if name in tensors}
        return {name: tensors[name].float() for name in ("target", "source", "reference", "mask")} | states

    def _file(self, path: Path):
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]


class EditTask(FlowMatchingTask):
    """A checkpoint, and the batches of its caches."""

    def __init__(self, recipe: EditRecipe, where: object = None):
        check(recipe, where)
        check_own(recipe, where)
        path = resolve(EMBEDDED.get(recipe.start_from, recipe.start_from), "dit.safetensors")
        check_caches(recipe, read_config(path))
        torch.manual_seed(recipe.seed)
        model = load_dit(path, attention=training_attention(recipe), dtype=DTYPES[recipe.weight_dtype], device=recipe.device, float8=recipe.float8).train()
        super().__init__(recipe, model, CachedBatches(recipe.caches, recipe.batch_size, recipe.seed))

    def states(self, batch: EditFeatures, generator: torch.Generator) -> Tensor:
        """Those of an empty instruction in a share of the steps."""
        dropped = torch.rand((), generator=generator) < self.recipe.condition_dropout
        return batch.negative if dropped else batch.states


def check_own(recipe: EditRecipe, where: object) -> None:
    """Raises UserError for values that a type does not rule out."""
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
    """A cache's contract. Raises UserError unless it was made for the checkpoint's layers and VLM."""
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
    """Raises UserError where a cache does not fit the checkpoint, or the first one, or lacks the empty instruction that is to be read."""
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
    return EditTask(parse_recipe(EditRecipe, values, where), where)
