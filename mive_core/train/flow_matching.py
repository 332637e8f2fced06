"""Flow matching training of a MiVE DiT (paper, training): all weights or a LoRA, with batches from any source.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..attention import AttentionFn, get_attention, matmul_attention
from ..cost.flops import Layout, dit_flops, training_flops
from ..dit import MiVEDiT
from ..errors import UserError
from ..flow import shift_time
from ..formats.checkpoint import save_dit
from ..formats.lora_file import lora_metadata, write_lora
from ..formats.untrained import NEW_PARTS
from ..pipeline import check_compiler, check_device
from . import blocks
from .distributed import full_tensor
from .loop import Task
from .lora import TARGETS, adapters_of, add_lora, as_module
from .new_parts import CHOICES, differences, stored_weights, train_whole, trains_new_parts
from .objective import EditFeatures, flow_matching_losses, one_step_prediction
from .optim import Muon, adamw_8bit
from .recipe import Recipe
from .throughput import Workload

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIME_SAMPLINGS = ("uniform", "logit_normal")
PREDICTION_TIMES = (0.1, 1.0)  # uniform range of t for scheduled sampling
OPTIMIZERS = ("adamw", "adamw_8bit")
TIME_LAYERS = ("time_embedding", "time_projection", "modulation")  # components of parameter names
GROUP_RATES = frozenset({"time_learning_rate", "muon_learning_rate"})  # a rate of 0 means no parameter group, so a checkpoint holds no state of one
ADJUSTABLE_FIELDS = GROUP_RATES | {"learning_rate", "new_parts_learning_rate", "weight_decay", "num_warmup_steps", "decay_ratio", "max_grad_norm", "num_steps"}
BLOCK_FIELDS = frozenset({"gradient_checkpointing", "offload", "compiled", "sharded"})
VALIDATION_FIELDS = frozenset(
    {"validate_every", "validate_at_start", "validation_manifest", "validation_cache", "validation_vae", "validation_pairs", "validation_steps"}
)


@dataclass(frozen=True, kw_only=True)
class FlowMatchingRecipe(Recipe):
    """Recipe of a DiT's training. Defaults are the paper's where it gives them; subclasses add fields and may change defaults."""

    start_from: str  # initial MiVE checkpoint, a file or folder, or tiny
    batch_size: int = 1  # pairs per batch and process
    learning_rate: float = 3e-5  # peak learning rate of AdamW
    time_learning_rate: float = 0.0  # peak learning rate of the time layers (TIME_LAYERS), which scale and gate whole branches; 0: learning_rate
    betas: tuple = (0.9, 0.999)  # decay rates of AdamW's two moments
    weight_decay: float = 0.01  # weight decay of AdamW
    optimizer: str = "adamw"  # adamw, or adamw_8bit: 8-bit moments (torchao)
    muon_learning_rate: float = 0.0  # peak learning rate of Muon on the blocks' matrices, a fraction of their norm; 0: AdamW for all weights
    muon_min_norm: float = 0.1  # lower bound on the norm in that fraction, so that matrices near zero can grow
    num_warmup_steps: int = 200  # steps of linear learning rate warmup
    decay_ratio: float = 0.0  # final part of the steps in which the learning rate decays linearly to zero, 0..1
    time_sampling: str = "uniform"  # distribution of t before the shift: uniform or logit_normal
    time_shift: float = 5.0  # timestep shift of t, see flow.shift_time
    scheduled_sampling_ratio: float = 0.0  # part of a batch, 0..1, that starts from the model's own one-step prediction of x_0 instead of the target
    edited_weight: float = 1.0  # loss weight of latent cells inside the edit mask, relative to 1 outside
    cauchy_scale: float = 0.0  # scale of the Cauchy loss on each region's error, see objective.cauchy_loss; 0: mean squared error over all cells
    lora_rank: int = 0  # rank of the LoRA; 0: training of all weights
    lora_alpha: float = 0.0  # LoRA alpha, where the LoRA is scaled by alpha / rank; 0: alpha = rank
    lora_targets: tuple[str, ...] = TARGETS  # layers of each block that the LoRA adapts
    new_parts: str = ""  # what Wan lacks, beside a LoRA: frozen or trained; "": trained if start_from is fresh from Wan, else frozen
    new_parts_learning_rate: float = 0.0  # peak learning rate of the new parts; 0: learning_rate
    attention: str = "auto"  # attention backend, see attention.py
    gradient_checkpointing: bool = False  # recomputation of each block's activations in the backward pass, to save memory
    offload: bool = False  # storage of the blocks' inputs in main memory; needs gradient_checkpointing
    compiled: bool = False  # torch.compile of the blocks
    sharded: bool = False  # weights sharded over the processes and gathered block by block (FSDP2)
    export_dtype: str = ""  # dtype of the exported weights: fp32, bf16 or fp16; "": the training dtype
    validate_every: int = 0  # steps between validations, which also follow the last step; 0: no validation
    validate_at_start: bool = False  # also before the first step
    validation_manifest: str = ""  # manifest of held-out pairs
    validation_cache: str = ""  # folder that `mive data cache` made of that manifest
    validation_vae: str = ""  # VAE file, or a folder with vae.safetensors, or tiny
    validation_pairs: int = 8  # number of pairs to validate on, from the start of the cache
    validation_steps: int = 0  # number of sampling steps; 0: the checkpoint's own

    @property
    def alpha(self) -> float:
        """The LoRA alpha in effect."""
        return self.lora_alpha or self.lora_rank

    def trains_new_parts(self, untrained: bool) -> bool:
        """Whether a LoRA's training trains the new parts whole beside it. Raises UserError if the untrained ones were to stay so."""
        return bool(self.lora_rank) and trains_new_parts(self.new_parts, untrained)

    @property
    def free_fields(self) -> frozenset[str]:
        """Adds fields of how blocks run and of validation."""
        return super().free_fields | BLOCK_FIELDS | VALIDATION_FIELDS

    def is_adjustable(self, field: str, old: Any) -> bool:
        """Learning rates, their schedule and num_steps may change, but Muon and the time layers' own rate are not switched on or off."""
        return field in ADJUSTABLE_FIELDS and (field not in GROUP_RATES or bool(old) == bool(getattr(self, field)))


class FlowMatchingTask(Task):
    """Task of the training loop for a DiT; subclasses provide the model and a dataset of EditFeatures batches."""

    recipe: FlowMatchingRecipe

    def __init__(self, recipe: FlowMatchingRecipe, model: MiVEDiT, dataset: Dataset, channel_weights: Tensor | float = 1.0, untrained: bool = False):
        """`channel_weights`, (C,) or one number, are the loss weights of the latent channels; `untrained`: the model's new parts have not learnt yet."""
        self.recipe, self.model, self.config, self.dataset, self.channel_weights = recipe, model, model.config, dataset, channel_weights
        if recipe.lora_rank:
            self.modules = {"lora": as_module(add_lora(model, recipe.lora_rank, recipe.lora_targets, recipe.alpha))}
        else:
            self.modules = {"dit": model.requires_grad_(True)}
        self.new_parts = train_whole(model) if recipe.trains_new_parts(untrained) else {}
        if self.new_parts:
            self.base, self.modules = stored_weights(self.new_parts), {**self.modules, "new_parts": as_module(self.new_parts)}
        if recipe.gradient_checkpointing:
            blocks.checkpoint_activations(model)
        if recipe.offload:
            blocks.offload_activations(model)
        if recipe.compiled:
            model.compile_blocks()
        if recipe.sharded:
            blocks.shard(model, recipe.bf16)
        self.optimizers = build_optimizers(recipe, next(iter(self.modules.values())), self.new_parts.values())

    def lr_factor(self, step: int) -> float:
        """Returns the factor of linear warmup and linear decay."""
        recipe = self.recipe
        remaining = (recipe.num_steps - step) / max(recipe.decay_ratio * recipe.num_steps, 1)
        return min((step + 1) / max(recipe.num_warmup_steps, 1), remaining, 1.0)

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws noise and t and returns the losses of flow_matching_losses."""
        noise = torch.randn(batch.target.shape, generator=generator)
        t = shift_time(draw_times(len(noise), self.recipe.time_sampling, generator), self.recipe.time_shift)
        num_predicted = self.num_predicted(len(noise))
        t[:num_predicted] = PREDICTION_TIMES[0] + (PREDICTION_TIMES[1] - PREDICTION_TIMES[0]) * torch.rand(num_predicted, generator=generator)
        states, device = self.states(batch, generator), self.recipe.device
        batch, states, noise, t = batch.to(device), states.to(device), noise.to(device), t.to(device)
        # with gradient checkpointing memory is scarce: autocast keeps no bfloat16 copies of the weights
        cache_casts = torch.is_autocast_cache_enabled() and not self.recipe.gradient_checkpointing
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=cache_casts):
            predictions = one_step_prediction(self.model, batch, states, noise[:num_predicted]) if num_predicted else None
            return flow_matching_losses(
                self.model, batch, states, noise, t, self.recipe.edited_weight, self.channel_weights, predictions, self.recipe.cauchy_scale
            )

    def num_predicted(self, batch_size: int) -> int:
        """Returns the number of entries of a batch that use scheduled sampling."""
        return round(self.recipe.scheduled_sampling_ratio * batch_size)

    def states(self, batch: EditFeatures, generator: torch.Generator) -> Tensor:
        """Returns the VLM states (B, K, S, D_vlm) to train on."""
        return batch.states

    def workload(self, batch: EditFeatures) -> Workload:
        size, layout = len(batch.target), Layout(batch.states.shape[2], self.config.patch_grid(*batch.target.shape[2:]), batch.reference.shape[2])
        trained_flops = training_flops(self.config, layout, frozen=bool(self.recipe.lora_rank), new_parts=bool(self.new_parts))
        prediction_flops = dit_flops(self.config, layout)
        return Workload(size, size * layout.num_tokens, size * trained_flops + self.num_predicted(size) * prediction_flops)

    def exported(self, name: str, weight: Tensor) -> Tensor:
        """Returns a weight as the finished model has it."""
        return weight

    def export_metadata(self) -> dict[str, str]:
        """Returns what a LoRA's metadata says beyond lora_metadata."""
        return {}

    def export(self, path: Path) -> None:
        """Writes a full MiVE checkpoint, or a LoRA with the differences of the new parts, if these were trained."""
        if self.recipe.lora_rank:
            changed = differences(self.new_parts, self.base) if self.new_parts else {}
            metadata = lora_metadata(self.recipe.lora_rank, Path(self.recipe.start_from).name, self.config, NEW_PARTS if changed else ())
            adapters = adapters_of(self.modules["lora"].state_dict())
            write_lora(path, adapters, self.recipe.alpha / self.recipe.lora_rank, changed, metadata | self.export_metadata() | self.recipe.metadata)
            return
        is_first = not distributed.is_initialized() or distributed.get_rank() == 0
        weights = {}
        for name, value in self.model.state_dict().items():
            full = full_tensor(value)
            if is_first:
                weights[name] = self.exported(name, full.cpu())
        if is_first:
            save_dit(path, weights, self.config, DTYPES.get(self.recipe.export_dtype), self.recipe.metadata)


def build_optimizers(recipe: FlowMatchingRecipe, trained: nn.Module, new_parts: Iterable[nn.Parameter] = ()) -> dict[str, torch.optim.Optimizer]:
    """Builds AdamW, and Muon for the blocks' matrices if it has a learning rate.

    AdamW has a parameter group of its own for the time layers, if these have a learning rate, and for the `new_parts` beside a LoRA.
    """
    matrices = [p for p in trained.blocks.parameters() if p.ndim == 2] if recipe.muon_learning_rate else []
    time_parameters = [p for name, p in trained.named_parameters() if not set(TIME_LAYERS).isdisjoint(name.split("."))] if recipe.time_learning_rate else []
    assigned = {id(p) for p in matrices + time_parameters}
    groups: list[dict[str, Any]] = [{"params": [p for p in trained.parameters() if id(p) not in assigned]}]
    if time_parameters:
        groups.append({"params": time_parameters, "lr": recipe.time_learning_rate})
    if whole := list(new_parts):
        groups.append({"params": whole, "lr": recipe.new_parts_learning_rate or recipe.learning_rate})
    settings = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    optimizers = {"adamw": torch.optim.AdamW(groups, fused=True, **settings) if recipe.optimizer == "adamw" else adamw_8bit(groups, **settings)}
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=recipe.muon_learning_rate, min_norm=recipe.muon_min_norm, dtype=torch.bfloat16 if recipe.bf16 else torch.float32)
    return optimizers


def draw_times(num: int, sampling: str, generator: torch.Generator) -> Tensor:
    """Draws (num,) times in 0..1: uniform, or logit-normal, the sigmoid of a normal variable."""
    return torch.rand(num, generator=generator) if sampling == "uniform" else torch.randn(num, generator=generator).sigmoid()


def training_attention(recipe: FlowMatchingRecipe) -> AttentionFn:
    """Returns the recipe's attention; `auto` in bfloat16 on a CPU is two matrix products, faster in forward and backward pass than torch's kernel."""
    return matmul_attention if (recipe.attention, recipe.device, recipe.bf16) == ("auto", "cpu", True) else get_attention(recipe.attention)


def check_recipe(recipe: FlowMatchingRecipe, where: object = None) -> None:
    """Raises UserError for invalid values and combinations."""
    check_device(recipe.device)
    if recipe.compiled:
        check_compiler(recipe.device)
    for name, known in (("time_sampling", TIME_SAMPLINGS), ("export_dtype", ("", *DTYPES)), ("optimizer", OPTIMIZERS), ("new_parts", CHOICES)):
        if getattr(recipe, name) not in known:
            raise UserError(f"the recipe's {name} is unknown", where=where, got=repr(getattr(recipe, name)), expected=" or ".join(known))
    unknown = sorted(set(recipe.lora_targets) - set(TARGETS))
    if unknown:
        raise UserError("a LoRA cannot sit there", where=where, got=", ".join(unknown), expected=", ".join(TARGETS))
    for wrong, what, fix in (
        (
            recipe.scheduled_sampling_ratio and not 1 <= round(recipe.scheduled_sampling_ratio * recipe.batch_size) <= recipe.batch_size,
            "scheduled_sampling_ratio is no part of a batch",
            "give a share of 0 to 1 that is a clip or more of batch_size",
        ),
        (recipe.cauchy_scale < 0, "cauchy_scale is an error, which is never below zero", "set cauchy_scale to 0 for no logarithm"),
        (recipe.sharded and recipe.lora_rank, "a LoRA is not sharded: its weights are few, and each process holds the frozen ones", "set sharded to false"),
        ((recipe.new_parts or recipe.new_parts_learning_rate) and not recipe.lora_rank, "new_parts says what is trained beside a LoRA", "set lora_rank"),
        (recipe.new_parts_learning_rate and recipe.new_parts == "frozen", "what is frozen has no learning rate", "leave new_parts_learning_rate out"),
        (recipe.time_learning_rate and recipe.lora_rank, "a LoRA leaves the time layers as they are", "leave time_learning_rate out"),
        (
            recipe.muon_learning_rate and recipe.lora_rank,
            "Muon moves whole matrices of the blocks, which a LoRA leaves as they are",
            "leave muon_learning_rate out",
        ),
        (
            recipe.sharded and recipe.muon_learning_rate,
            "Muon moves whole matrices of the blocks, of which a process has a part",
            "leave muon_learning_rate out",
        ),
        (recipe.sharded and recipe.optimizer == "adamw_8bit", "averages in 8 bits are not sharded", "take adamw: each process holds its part only"),
        (recipe.offload and not recipe.gradient_checkpointing, "offload moves what gradient_checkpointing keeps", "set gradient_checkpointing to true"),
        (recipe.offload and recipe.compiled, "a compiled block keeps its weights too, which offload would move", "set compiled or offload to false"),
    ):
        if wrong:
            raise UserError(what, where=where, fix=fix)
