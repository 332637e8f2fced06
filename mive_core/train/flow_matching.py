"""Learning the velocity (paper, training): the task of a MiVE DiT, all of its weights or a LoRA, wherever its batches come from.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..attention import AttentionFn, attention_of, matmul_attention
from ..cost.flops import Layout, dit_flops, training_flops
from ..dit import MiVEDiT
from ..errors import UserError
from ..flow import shift_time
from ..formats.checkpoint import save_dit
from ..pipeline import check_compiler, check_device
from . import blocks
from .distributed import whole
from .loop import Task
from .lora import TARGETS, add_lora, as_module, save_lora
from .objective import EditFeatures, flow_matching_losses, one_step_prediction
from .optim import Muon, adamw_8bit
from .recipe import Recipe
from .throughput import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TIME_SAMPLINGS = ("uniform", "logit_normal")
PREDICTION_TIMES = (0.1, 1.0)  # uniform between
OPTIMIZERS = ("adamw", "adamw_8bit")
TIME_LAYERS = ("time_embedding", "time_projection", "modulation")  # parts of a parameter's name
BLOCK_FIELDS = frozenset({"gradient_checkpointing", "offload", "compiled", "sharded"})
VALIDATION_FIELDS = frozenset({"validate_every", "validation_manifest", "validation_cache", "validation_vae", "validation_pairs", "validation_steps"})


@dataclass(frozen=True, kw_only=True)
class FlowMatchingRecipe(Recipe):
    """How a DiT is trained. Each source of batches adds its fields, and has defaults of its own; these are the paper's, where it says."""

    start_from: str  # a MiVE checkpoint, or tiny
    batch_size: int = 1
    learning_rate: float = 3e-5
    time_learning_rate: float = 0.0  # of what turns t into scales and gates of whole branches (TIME_LAYERS); 0: learning_rate
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.01
    optimizer: str = "adamw"  # adamw_8bit: its two averages in 8 bits (torchao)
    muon_learning_rate: float = 0.0  # of the blocks' matrices, a fraction of their norm; 0: AdamW moves them too
    muon_min_norm: float = 0.1  # norm below which a matrix counts as that large: what starts near zero moves by this share of it
    num_warmup_steps: int = 200
    decay_ratio: float = 0.0  # of the steps, at the end, linear to zero
    time_sampling: str = "uniform"
    time_shift: float = 5.0
    scheduled_sampling_ratio: float = 0.0  # of a batch that starts from the model's own first draft instead of the target, and is to mend it
    edited_weight: float = 1.0  # of the loss in latent cells under the mask, against 1 elsewhere
    cauchy_scale: float = 0.0  # above it a clip's error counts by its logarithm, see objective.cauchy_loss; 0: as it is, and clips by their cells
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: float = 0.0  # the LoRA counts by alpha / rank; 0: the rank, so by 1
    lora_targets: tuple = TARGETS
    attention: str = "auto"
    gradient_checkpointing: bool = False  # a block's activations are computed again in the backward pass, and not kept
    offload: bool = False  # what is then kept, blocks' inputs, waits in main memory
    compiled: bool = False  # blocks by torch.compile
    sharded: bool = False  # several processes hold a part of all weights each, put together block by block (FSDP2)
    export_dtype: str = ""  # of the finished model's weights; "": as they were trained
    validate_every: int = 0  # steps, and after the last one; 0: never
    validation_manifest: str = ""  # held-out pairs
    validation_cache: str = ""  # what `mive data cache` made of them
    validation_vae: str = ""  # a file, or a folder with vae.safetensors
    validation_pairs: int = 8  # the first ones
    validation_steps: int = 0  # of sampling, 0: the checkpoint's own

    @property
    def alpha(self) -> float:
        return self.lora_alpha or self.lora_rank

    @property
    def free_fields(self) -> frozenset[str]:
        """How blocks run and what is measured may change too; without a decay, so may the number of steps: a finished run can be extended."""
        return super().free_fields | BLOCK_FIELDS | VALIDATION_FIELDS | (frozenset() if self.decay_ratio else {"num_steps"})


class FlowMatchingTask(Task):
    """The training loop's task; each source of batches makes the model and brings a dataset of EditFeatures."""

    def __init__(self, recipe: FlowMatchingRecipe, model: MiVEDiT, dataset: Dataset, channels: Tensor | float = 1.0):
        """`channels`, (C,) or one number, weighs latent channels in the loss."""
        self.recipe, self.model, self.config, self.dataset, self.channels = recipe, model, model.config, dataset, channels
        if recipe.lora_rank:
            self.modules = {"lora": as_module(add_lora(model, recipe.lora_rank, recipe.lora_targets, recipe.alpha))}
        else:
            self.modules = {"dit": model.requires_grad_(True)}
        if recipe.gradient_checkpointing:
            blocks.checkpoint_activations(model)
        if recipe.offload:
            blocks.offload(model)
        if recipe.compiled:
            model.compile_blocks()
        if recipe.sharded:
            blocks.shard(model, recipe.bf16)
        self.optimizers = optimizers_of(recipe, next(iter(self.modules.values())))

    def rate(self, step: int) -> float:
        recipe = self.recipe
        remaining = (recipe.num_steps - step) / max(recipe.decay_ratio * recipe.num_steps, 1)
        return min((step + 1) / recipe.num_warmup_steps, remaining, 1.0)

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared error of the velocity over the target's frames, and the same inside and outside the mask."""
        noise = torch.randn(batch.target.shape, generator=generator)
        t = shift_time(draw_times(len(noise), self.recipe.time_sampling, generator), self.recipe.time_shift)
        num_predicted = self.num_predicted(len(noise))
        t[:num_predicted] = PREDICTION_TIMES[0] + (PREDICTION_TIMES[1] - PREDICTION_TIMES[0]) * torch.rand(num_predicted, generator=generator)
        states, device = self.states(batch, generator), self.recipe.device
        batch, states, noise, t = (x.to(device) for x in (batch, states, noise, t))
        # where memory is short no copy of the weights in bf16 is kept for a second use
        keep = torch.is_autocast_cache_enabled() and not self.recipe.gradient_checkpointing
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=keep):
            drafts = one_step_prediction(self.model, batch, states, noise[:num_predicted]) if num_predicted else None
            return flow_matching_losses(self.model, batch, states, noise, t, self.recipe.edited_weight, self.channels, drafts, self.recipe.cauchy_scale)

    def num_predicted(self, batch_size: int) -> int:
        return round(self.recipe.scheduled_sampling_ratio * batch_size)

    def states(self, batch: EditFeatures, generator: torch.Generator) -> Tensor:
        """(B, K, S, D_vlm) to read."""
        return batch.states

    def work(self, batch: EditFeatures) -> Work:
        size, layout = len(batch.target), Layout(batch.states.shape[2], self.config.patch_grid(*batch.target.shape[2:]))
        learned, drafted = training_flops(self.config, layout, frozen=bool(self.recipe.lora_rank)), dit_flops(self.config, layout)
        return Work(size, size * layout.num_tokens, size * learned + self.num_predicted(size) * drafted)

    def export(self, path: Path) -> None:
        """A whole MiVE checkpoint, or a LoRA in peft's format."""
        if self.recipe.lora_rank:
            about = {"mive.lora": f"rank {self.recipe.lora_rank}", "mive.base": Path(self.recipe.start_from).name, **self.recipe.about}
            save_lora(path, self.modules["lora"], self.recipe.alpha / self.recipe.lora_rank, about)
            return
        is_first = not distributed.is_initialized() or distributed.get_rank() == 0
        weights = {}
        for name, value in self.model.state_dict().items():
            joined = whole(value)
            if is_first:
                weights[name] = joined.cpu()
        if is_first:
            save_dit(path, weights, self.config, DTYPES.get(self.recipe.export_dtype), self.recipe.about)


def optimizers_of(recipe: FlowMatchingRecipe, trained: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """AdamW, of 8 bits where asked, and Muon for the blocks' matrices where it has a rate. The time layers are a group of AdamW where they have one."""
    matrices = [p for p in trained.blocks.parameters() if p.ndim == 2] if recipe.muon_learning_rate else []
    of_time = [p for name, p in trained.named_parameters() if not set(TIME_LAYERS).isdisjoint(name.split("."))] if recipe.time_learning_rate else []
    held = {id(p) for p in matrices + of_time}
    groups = [{"params": [p for p in trained.parameters() if id(p) not in held]}]
    if of_time:
        groups.append({"params": of_time, "lr": recipe.time_learning_rate})
    settings = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    optimizers = {"adamw": torch.optim.AdamW(groups, fused=True, **settings) if recipe.optimizer == "adamw" else adamw_8bit(groups, **settings)}
    if matrices:
        optimizers["muon"] = Muon(matrices, lr=recipe.muon_learning_rate, floor=recipe.muon_min_norm, dtype=torch.bfloat16 if recipe.bf16 else torch.float32)
    return optimizers


def draw_times(num: int, sampling: str, generator: torch.Generator) -> Tensor:
    """(num,) in 0..1: uniform, or the logistic of a normal variable."""
    return torch.rand(num, generator=generator) if sampling == "uniform" else torch.randn(num, generator=generator).sigmoid()


def training_attention(recipe: FlowMatchingRecipe) -> AttentionFn:
    """The recipe's; in bfloat16 on a CPU two matrix products are faster forward and backward than torch's kernel."""
    return matmul_attention if (recipe.attention, recipe.device, recipe.bf16) == ("auto", "cpu", True) else attention_of(recipe.attention)


def check(recipe: FlowMatchingRecipe, where: object = None) -> None:
    """Raises UserError for values that a type does not rule out."""
    check_device(recipe.device)
    if recipe.compiled:
        check_compiler(recipe.device)
    for name, known in (("time_sampling", TIME_SAMPLINGS), ("export_dtype", ("", *DTYPES)), ("optimizer", OPTIMIZERS)):
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
