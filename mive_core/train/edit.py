"""Training a MiVE DiT on cached pairs: all of its weights, or a LoRA that stock loaders take (paper, training).

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from ..attention import attention_of
from ..checkpoint import load_dit, save_dit
from ..config import MiVEConfig
from ..dit import MiVEDiT
from ..errors import UserError
from ..flow import shift_time
from ..sample import check_device
from ..tensors import write_tensors
from .cache import CacheEntry, read_index, restored
from .loop import step_seed
from .objective import EditFeatures, velocity_losses
from .ranks import whole
from .recipe import Recipe, parse_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIME_SAMPLINGS = ("uniform", "logit_normal")
LORA_TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "ffn.0", "ffn.2")
LORA_PREFIX = "diffusion_model."  # under which ComfyUI looks for the keys of a LoRA in peft's format
OPEN_SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class EditRecipe(Recipe):
    """How a DiT is trained on cached pairs. The defaults are the paper's, where it says."""

    start_from: str  # a MiVE checkpoint: what `mive init-from-wan` or an earlier run wrote
    caches: tuple  # folders that `mive data cache` wrote for that checkpoint
    lora_rank: int = 0  # 0: all weights are trained
    lora_targets: tuple = LORA_TARGETS
    weight_dtype: str = "fp32"  # of what is loaded; a LoRA's own weights are float32
    attention: str = "auto"
    batch_size: int = 1
    learning_rate: float = 3e-5
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.01
    num_warmup_steps: int = 200
    time_sampling: str = "uniform"
    time_shift: float = 5.0
    condition_dropout: float = 0.0  # share of the steps that read the empty instruction, for guidance
    edited_weight: float = 1.0  # of the loss in latent cells under the mask, against 1 elsewhere
    recompute: bool = False  # a block's activations are computed again in the backward pass, and not kept
    sharded: bool = False  # several processes hold a part of all weights each, put together block by block (FSDP2)


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

    def __getitem__(self, index: int) -> tuple[EditFeatures, Tensor | None]:
        """The batch, and the states (B, K, S', D_vlm) of an empty instruction where its pairs have them."""
        epoch, place = divmod(index, self.num_batches)
        read = [self.read(folder, entry) for folder, entry in self.order(epoch)[place]]
        stack = lambda name: torch.stack([features[name] for features in read])
        batch = EditFeatures(**{name: stack(name) for name in EditFeatures.__dataclass_fields__})
        return batch, stack("negative") if all("negative" in features for features in read) else None

    def read(self, folder: str, entry: CacheEntry) -> dict[str, Tensor]:
        """One pair's features in float32. Raises UserError where the shard is gone or damaged."""
        path = Path(folder) / entry.shard
        try:
            file = self._file(path)
            names = [key for key in file.keys() if key.startswith(f"{entry.key}.")]
            tensors = {key.split(".", 1)[1]: file.get_tensor(key) for key in names}
        except (OSError, SafetensorError) as error:
            raise UserError("a shard of the cache cannot be read", where=path, got=str(error), fix="run `mive data cache` again: only what is missing is computed") from None
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


class EditTask:
    """Task 'edit' of the training loop."""

    def __init__(self, recipe: EditRecipe, where: object = None):
        check(recipe, where)
        self.recipe = recipe
        torch.manual_seed(recipe.seed)
        self.model = load_dit(recipe.start_from, attention=attention_of(recipe.attention), dtype=DTYPES[recipe.weight_dtype], device=recipe.device).train()
        self.config = self.model.config
        for folder in recipe.caches:
            check_cache(folder, self.config, recipe)
        self.dataset = CachedBatches(recipe.caches, recipe.batch_size, recipe.seed)
        if recipe.lora_rank:
            trained = add_lora(self.model, recipe.lora_rank, recipe.lora_targets)
            self.modules = {"lora": nn.ParameterDict({name.replace(".", "/"): parameter for name, parameter in trained.items()})}
        else:
            self.modules = {"dit": self.model.requires_grad_(True)}
        if recipe.recompute:
            recompute_blocks(self.model)
        if recipe.sharded:
            shard(self.model)
        self.optimizers = {"adamw": torch.optim.AdamW(self.modules[next(iter(self.modules))].parameters(), lr=recipe.learning_rate, betas=recipe.betas,
                                                      weight_decay=recipe.weight_decay, fused=True)}

    def rate(self, step: int) -> float:
        return min((step + 1) / self.recipe.num_warmup_steps, 1.0)

    def loss(self, step: int, batch: tuple[EditFeatures, Tensor | None], generator: torch.Generator) -> dict[str, Tensor]:
        """Squared error of the velocity over the target's frames, and the same inside and outside the mask."""
        features, negative = batch
        noise = torch.randn(features.target.shape, generator=generator)
        t = shift_time(draw_times(len(noise), self.recipe.time_sampling, generator), self.recipe.time_shift)
        dropped = torch.rand((), generator=generator) < self.recipe.condition_dropout
        features = EditFeatures(**{name: getattr(features, name).to(self.recipe.device) for name in EditFeatures.__dataclass_fields__})
        states = negative.to(self.recipe.device) if dropped else features.states
        return velocity_losses(self.model, features, states, noise.to(self.recipe.device), t.to(self.recipe.device), self.recipe.edited_weight)

    def after_step(self, step: int) -> None:
        """Nothing to bound."""

    def export(self, path: Path) -> None:
        """A whole MiVE checkpoint in the dtype it was loaded in, or a LoRA in peft's format."""
        if self.recipe.lora_rank:
            save_lora(path, self.modules["lora"], self.recipe)
            return
        weights = {name: whole(value) for name, value in self.model.state_dict().items()}
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            save_dit(path, weights, self.config)


def draw_times(num: int, sampling: str, generator: torch.Generator) -> Tensor:
    """(num,) in 0..1: uniform, or the logistic of a normal variable."""
    return torch.rand(num, generator=generator) if sampling == "uniform" else torch.randn(num, generator=generator).sigmoid()


def add_lora(model: MiVEDiT, rank: int, targets: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Puts peft's adapters on the blocks' layers of those names -> the weights to train, by peft's names; the rest is frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("a LoRA needs the package peft", got=str(error), fix='pip install "mive[train]"') from None
    pattern = "|".join(target.replace(".", r"\.") for target in targets)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=rf"blocks\.\d+\.({pattern})"), model)
    trained = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained


def save_lora(path: Path, weights: nn.ParameterDict, recipe: EditRecipe) -> None:
    """peft's keys less its adapter's name, under ComfyUI's prefix: diffusion_model.blocks.0.self_attn.q.lora_A.weight."""
    tensors = {LORA_PREFIX + name.replace("/", ".").replace(".default.", "."): value for name, value in weights.items()}
    write_tensors(path, tensors, {"format": "pt", "mive.lora": f"rank {recipe.lora_rank}", "mive.base": Path(recipe.start_from).name})


def recompute_blocks(model: MiVEDiT) -> None:
    """Gradient checkpointing: a block keeps its input only."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: MiVEDiT) -> None:
    """FSDP2: a block's weights are whole only while it runs, the others' while the model does. Raises UserError where it runs alone."""
    if not distributed.is_initialized():
        raise UserError("sharded training takes several processes", got="one", fix="start it with torchrun or `accelerate launch`")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "embed_condition")


def check(recipe: EditRecipe, where: object) -> None:
    """Raises UserError for values that a type does not rule out."""
    check_device(recipe.device)
    for name, known in (("time_sampling", TIME_SAMPLINGS), ("weight_dtype", tuple(DTYPES))):
        if getattr(recipe, name) not in known:
            raise UserError(f"the recipe's {name} is unknown", where=where, got=repr(getattr(recipe, name)), expected=" or ".join(known))
    unknown = sorted(set(recipe.lora_targets) - set(LORA_TARGETS))
    if unknown:
        raise UserError("a LoRA cannot sit there", where=where, got=", ".join(unknown), expected=", ".join(LORA_TARGETS))
    if recipe.sharded and recipe.lora_rank:
        raise UserError("a LoRA is not sharded: its weights are few, and each process holds the frozen ones", where=where, fix="set sharded to false")
    if not recipe.caches:
        raise UserError("the recipe names no cache", where=where, fix="`mive data cache` makes one")


def check_cache(folder: str, config: MiVEConfig, recipe: EditRecipe) -> None:
    """Raises UserError unless the cache was made for the checkpoint's layers and VLM, and holds what the recipe needs."""
    contract = read_index(folder)["contract"]
    for key, wanted in (("layers", list(config.resolved_layers)), ("vlm_width", config.vlm_width), ("vlm_num_layers", config.vlm_num_layers),
                        ("latent_format", config.latent_format)):
        if contract.get(key) != wanted:
            raise UserError(f"the cache was made for other {key}", where=folder, got=contract.get(key), expected=wanted,
                            fix="run `mive data cache` with the checkpoint that is to be trained")
    if recipe.condition_dropout and not contract.get("negative"):
        raise UserError("condition_dropout needs the states of an empty instruction", where=folder, fix="run `mive data cache --negative` into another folder")


def build(values: dict, where: object = None) -> EditTask:
    return EditTask(parse_recipe(EditRecipe, values, where), where)
