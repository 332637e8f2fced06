"""Task dit: trains a DiT on synthetic clips, from scratch or from a shallower DiT.

B batch, C latent channels, T x Y x X latent grid, K chosen layers, S VLM tokens, D_vlm their width.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import PRESETS, MiVEConfig
from ..dit import MiVEDiT
from ..errors import UserError
from ..formats.safetensors_file import read_tensors
from ..layers import parse_layers
from ..train.flow_matching import FlowMatchingRecipe, FlowMatchingTask, check_recipe, training_attention
from ..train.launcher import num_batches
from ..train.loop import step_seed
from ..train.objective import EditFeatures, collate
from ..train.recipe import parse_recipe
from .auxiliary_heads import AuxiliaryHeads
from .features import NUM_PER_SHARD, Bucket, compute, shards_of, wait
from .vae_network import LATENT_CHANNELS, WholeClipVAE, decode_clips, read_whole_clip_vae


@dataclass(frozen=True, kw_only=True)
class DiTRecipe(FlowMatchingRecipe):
    """Recipe of a DiT's training on synthetic clips."""

    preset: str  # name of the model's configuration
    vae: str  # VAE file
    vlm: str  # VLM folder
    features_dir: str  # folder of the computed features
    features_seed: int  # seed of the synthetic clips
    buckets: tuple  # (width, height, frames, clips, share of the steps) each, optionally followed by lists of kinds and of edits
    layers: str = "first+last"  # VLM layers that condition the DiT
    num_feature_processes: int = 2  # processes that compute features
    growth_ratio: float = 0.0  # part of the steps in which the clips in use grow from a few to all, while the others are computed; 0: compute all first
    num_same_size: int = 1  # number of consecutive batches of one size, so that parallel processes take equally long
    channel_power: float = 0.0  # loss weight of a latent channel: its effect on the decoded pixels to this power
    identity_init: bool = False  # initial weights that copy the source, see initialise_identity
    auxiliary_weight: float = 0.0  # loss weight of the auxiliary heads, see auxiliary_heads.py; 0: no heads
    auxiliary_blocks: tuple = (3, 7)  # blocks that predict place and shape of the edited object, and its outline
    start_from: str = ""  # checkpoint with the initial weights, of the same widths; it may have fewer blocks, see deepen; "": random
    start_ratio: float = 0.0  # share of start_from's weights in the finished ones, which keeps more of what was known (Wortsman et al. 2022, WiSE-FT)
    num_blocks: int = 0  # number of blocks; 0: the preset's
    batch_size: int = 8
    learning_rate: float = 1.2e-3
    betas: tuple = (0.9, 0.98)
    num_warmup_steps: int = 80
    decay_ratio: float = 0.25
    time_shift: float = 3.0
    edited_weight: float = 4.0
    export_dtype: str = "fp16"


class FeatureBatches(Dataset):
    """dataset[step] is a batch of one clip size, one sequence length and one number of references, so that nothing is padded."""

    def __init__(self, buckets: list[tuple[Bucket, Sequence[EditFeatures]]], batch_size: int, seed: int, num_same_size: int = 1, num_growing: int = 0):
        """Over the first `num_growing` batches the set of clips in use grows to all, one shard's number of clips at a time."""
        self.buckets = buckets
        self.batch_size, self.seed, self.num_same_size, self.num_growing = batch_size, seed, num_same_size, num_growing
        self.num_indexed = [0] * len(buckets)  # clips of each bucket that are in by_length
        self.by_length: list[dict[tuple[int, int], list[int]]] = [{} for _ in buckets]  # per bucket: length and number of references -> clips, in order

    def __getitem__(self, step: int) -> EditFeatures:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        size_generator = generator if self.num_same_size == 1 else torch.Generator().manual_seed(step_seed(self.seed + 1, step // self.num_same_size))
        probabilities, groups = zip(*self.groups(step // self.num_same_size * self.num_same_size))
        entries, indices, count = groups[torch.multinomial(torch.tensor(probabilities), 1, generator=size_generator)]
        chosen = torch.randint(count, (self.batch_size,), generator=generator).tolist()
        return collate([entries[indices[i]] for i in chosen])

    def groups(self, step: int) -> Iterator[tuple[float, tuple[Sequence[EditFeatures], list[int], int]]]:
        """Yields the groups that a batch may be drawn from: probability, bucket's clips, indices of those of one length, number of these available."""
        for number, (bucket, entries) in enumerate(self.buckets):
            num_available = self.num_available(step, len(entries))
            lengths = self.by_length[number]
            for index in range(self.num_indexed[number], num_available):
                entry = entries[index]
                lengths.setdefault((entry.states.shape[1], entry.reference.shape[1]), []).append(index)
            self.num_indexed[number] = max(self.num_indexed[number], num_available)
            for _, indices in sorted(lengths.items()):
                if count := bisect_left(indices, num_available):
                    yield bucket.share * count / num_available, (entries, indices, count)

    def num_available(self, step: int, num_clips: int) -> int:
        """Returns the number of a bucket's clips that the step may draw from."""
        if step >= self.num_growing:
            return num_clips
        return min(NUM_PER_SHARD * math.ceil((step + 1) / self.num_growing * num_clips / NUM_PER_SHARD), num_clips)


class DiTTask(FlowMatchingTask):
    """Trains a new DiT, or an existing one further, on synthetic clips."""

    recipe: DiTRecipe

    def __init__(self, recipe: DiTRecipe, config: MiVEConfig, dataset: Dataset):
        torch.manual_seed(recipe.seed)
        model = MiVEDiT(config, operations=nn, attention=training_attention(recipe))
        if recipe.start_from:
            weights = {key: value.float() for key, value in read_tensors(Path(recipe.start_from)).items()}
            self.start = deepen(weights, config.num_blocks)
            model.load_state_dict(self.start)
        else:
            initialise(model)
            if recipe.identity_init:
                initialise_identity(model)
        channels = channel_weights(read_whole_clip_vae(recipe.vae), recipe.channel_power) if recipe.channel_power else torch.ones(1)
        super().__init__(recipe, model.to(recipe.device), dataset, channels.to(recipe.device))
        if recipe.auxiliary_weight:
            self.auxiliary = AuxiliaryHeads(model, *recipe.auxiliary_blocks).to(recipe.device)
            self.modules = {**self.modules, "auxiliary": self.auxiliary}
            self.optimizers["adamw"].add_param_group({"params": list(self.auxiliary.parameters())})

    def exported(self, name: str, weight: Tensor) -> Tensor:
        """Returns the mean of a trained weight and the one it started from, as start_ratio says."""
        return torch.lerp(weight, self.start[name], self.recipe.start_ratio) if self.recipe.start_ratio else weight

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """Adds the auxiliary heads' losses to those of FlowMatchingTask."""
        losses = super().loss(step, batch, generator)
        if self.recipe.auxiliary_weight:
            with torch.autocast(torch.device(self.recipe.device).type, enabled=False):
                auxiliary = self.auxiliary.losses(batch.to(self.recipe.device))
            losses |= {**auxiliary, "loss": losses["loss"] + self.recipe.auxiliary_weight * sum(auxiliary.values())}
        return losses


@torch.no_grad()
def channel_weights(vae: WholeClipVAE, power: float) -> Tensor:
    """Returns (C,) of mean 1: the RMS change of the decoded pixels when one normalised channel is resampled, to a power."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(LATENT_CHANNELS, 3, 8, 8, generator=generator)
    changed = base.repeat(LATENT_CHANNELS, 1, 1, 1, 1)
    changed[range(LATENT_CHANNELS), range(LATENT_CHANNELS)] = torch.randn(base.shape, generator=generator)
    effect = (decode_clips(vae, changed) - decode_clips(vae, base[None])).square().mean(dim=(1, 2, 3, 4)).sqrt()
    weights = effect**power
    return weights / weights.mean()


@torch.no_grad()
def initialise(model: MiVEDiT) -> None:
    """Initialises as Wan does: Xavier for linear layers, small time layers, a zero output head."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    for layer in (model.time_embedding[0], model.time_embedding[2]):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(model.head.head.weight)


@torch.no_grad()
def initialise_identity(model: MiVEDiT, gain: float = 0.8, branch: float = 0.3) -> None:
    """(ours) Initialises a DiT without a pretrained backbone to copy the source: the head outputs the difference of noisy and source patches.

    The residual stream carries both patches. x_t - source is t times the velocity wherever the edit keeps the source, so that only the
    edit has to be learned. `branch` scales the blocks' initial outputs. Raises UserError unless the width holds both patches (2 * 4 * C).
    """
    config = model.config
    channels, size = config.latent_channels, math.prod(config.patch_size) * config.latent_channels
    if 2 * size > config.width:
        raise UserError("the width does not hold a noisy and a source patch", got=config.width, expected=f"at least {2 * size}")
    identity = torch.eye(size).unflatten(1, (*config.patch_size, channels)).movedim(-1, 1)  # input (py px c), in the order of the head's outputs
    weight = model.patch_embedding.weight
    weight[: 2 * size] = 0
    weight[:size, :channels] = identity
    weight[size : 2 * size, channels:] = identity
    model.head.head.weight[:, :size] = gain * torch.eye(size)
    model.head.head.weight[:, size : 2 * size] = -gain * torch.eye(size)
    for block in model.blocks:
        block.self_attn.o.weight.mul_(branch)
        block.ffn[2].weight.mul_(branch)
        block.modulation[:, [2, 5]] *= branch


def deepen(weights: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Expands a DiT's state dict to more blocks. Each new block copies its predecessor with zero output layers, so the function stays the same."""
    num_old = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    old_positions = [i * num_blocks // num_old for i in range(num_old)]
    deeper = {key: value for key, value in weights.items() if not key.startswith("blocks.")}
    for position in range(num_blocks):
        origin = max(i for i in range(num_old) if old_positions[i] <= position)
        for key, value in weights.items():
            if key.startswith(f"blocks.{origin}."):
                name = key.split(".", 2)[2]
                is_zero = position not in old_positions and name.startswith(("self_attn.o.", "ffn.2."))
                deeper[f"blocks.{position}.{name}"] = torch.zeros_like(value) if is_zero else value.clone()
    return deeper


def check_auxiliary(recipe: DiTRecipe, num_blocks: int, where: object) -> None:
    """Raises UserError for settings with which auxiliary heads do not work."""
    if not recipe.auxiliary_weight:
        return
    if len(recipe.auxiliary_blocks) != 2 or not all(type(i) is int and 0 <= i < num_blocks for i in recipe.auxiliary_blocks):
        raise UserError(
            "auxiliary_blocks names the block that is to know place and shape, and the one that is to know the outline",
            where=where,
            got=str(list(recipe.auxiliary_blocks)),
            expected=f"two numbers from 0 to {num_blocks - 1}",
        )
    if recipe.gradient_checkpointing:
        raise UserError("auxiliary heads read what leaves a block, once a step", where=where, fix="set gradient_checkpointing to false")


def build(values: dict, where: object = None) -> DiTTask:
    """Builds the task from a recipe's values; missing features are computed before, or during training if growth_ratio is set."""
    recipe = parse_recipe(DiTRecipe, values, where)
    check_recipe(recipe, where)
    config = PRESETS[recipe.preset]
    config = replace(config, layers=parse_layers(recipe.layers, config.vlm_num_layers), num_blocks=recipe.num_blocks or config.num_blocks)
    if not 0 <= recipe.start_ratio < 1 or (recipe.start_ratio and not recipe.start_from):
        raise UserError("start_ratio is a share of start_from's weights", where=where, got=recipe.start_ratio, expected="0 to 1, and a start_from")
    check_auxiliary(recipe, config.num_blocks, where)
    if recipe.growth_ratio and recipe.num_workers:
        raise UserError("clips that grow are read where they are waited for", where=where, got=f"num_workers {recipe.num_workers}", fix="set num_workers to 0")
    buckets = [
        Bucket((width, height), num_frames, num_clips, share, *map(tuple, chosen)) for width, height, num_frames, num_clips, share, *chosen in recipe.buckets
    ]
    clips = compute(
        [
            shards_of(
                bucket,
                vae=recipe.vae,
                vlm=recipe.vlm,
                config=config,
                seed=recipe.features_seed,
                folder=recipe.features_dir,
                objects=recipe.auxiliary_weight > 0,
            )
            for bucket in buckets
        ],
        recipe.num_feature_processes,
    )
    num_growing = round(recipe.growth_ratio * num_batches(recipe.num_steps, recipe.gradient_accumulation_steps))
    entries = clips if num_growing else wait(clips)
    return DiTTask(recipe, config, FeatureBatches(list(zip(buckets, entries)), recipe.batch_size, recipe.seed, recipe.num_same_size, num_growing))
