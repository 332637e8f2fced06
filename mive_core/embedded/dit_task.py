"""Task dit: a DiT trained on drawn clips, from nothing or from a smaller one.

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
from ..train.flow_matching import FlowMatchingRecipe, FlowMatchingTask, check, training_attention
from ..train.loop import step_seed
from ..train.objective import EditFeatures, stacked
from ..train.recipe import parse_recipe
from .auxiliary_heads import AuxiliaryHeads
from .features import NUM_PER_SHARD, Bucket, compute, shards_of, wait
from .vae_network import LATENT_CHANNELS, WholeClipVAE, decode_clips, read_whole_clip_vae


@dataclass(frozen=True, kw_only=True)
class DiTRecipe(FlowMatchingRecipe):
    """How a DiT is trained on drawn clips."""

    preset: str
    vae: str  # file
    vlm: str  # folder
    features_dir: str
    features_seed: int  # of the drawn clips
    buckets: tuple  # (width, height, frames, clips, share of the steps) each; kinds and edits, lists of names, may follow
    layers: str = "first+last"
    num_feature_processes: int = 2
    growth_ratio: float = 0.0  # of the steps, while which the clips that are drawn from grow from a few to all; the others are computed meanwhile
    num_same_size: int = 1  # batches in a row that are of one size, so that as many processes take equally long
    channel_power: float = 0.0  # of a latent channel's effect on the decoded pixels, that the loss weighs it by
    identity_init: bool = False  # see initialise_identity
    auxiliary_weight: float = 0.0  # of what the DiT is told about the edited thing beside the velocity, see auxiliary_heads.py; 0: nothing
    auxiliary_blocks: tuple = (3, 7)  # that are to know its place and shape, and its outline
    start_from: str = ""  # of the same shapes; it may have fewer blocks, see deepen
    num_blocks: int = 0  # 0: the preset's
    batch_size: int = 8
    learning_rate: float = 1.2e-3
    betas: tuple = (0.9, 0.98)
    num_warmup_steps: int = 80
    decay_ratio: float = 0.25
    time_shift: float = 3.0
    edited_weight: float = 4.0
    export_dtype: str = "fp16"


class FeatureBatches(Dataset):
    """dataset[step] is a batch of one size and one sequence length, so that nothing is padded."""

    def __init__(self, buckets: list[tuple[Bucket, Sequence[EditFeatures]]], batch_size: int, seed: int, num_same_size: int = 1, num_growing: int = 0):
        """Over the first `num_growing` batches the clips that they are drawn from grow to all, a shard's number at a time."""
        self.buckets = buckets
        self.batch_size, self.seed, self.num_same_size, self.num_growing = batch_size, seed, num_same_size, num_growing
        self.seen = [0] * len(buckets)
        self.of_length: list[dict[int, list[int]]] = [{} for _ in buckets]  # for each bucket, by length: the clips seen, in order

    def __getitem__(self, step: int) -> EditFeatures:
        generator = torch.Generator().manual_seed(step_seed(self.seed, step))
        of_size = generator if self.num_same_size == 1 else torch.Generator().manual_seed(step_seed(self.seed + 1, step // self.num_same_size))
        shares, groups = zip(*self.groups(step // self.num_same_size * self.num_same_size))
        entries, indices, count = groups[torch.multinomial(torch.tensor(shares), 1, generator=of_size)]
        chosen = torch.randint(count, (self.batch_size,), generator=generator).tolist()
        return stacked([entries[indices[i]] for i in chosen])

    def groups(self, step: int) -> Iterator[tuple[float, tuple[Sequence[EditFeatures], list[int], int]]]:
        """What a batch may be of: its share of the steps, a bucket's clips, which of them are of one length, and how many of those are there by now."""
        for place, (bucket, entries) in enumerate(self.buckets):
            num = self.num_there(step, len(entries))
            lengths = self.of_length[place]
            for index in range(self.seen[place], num):
                lengths.setdefault(entries[index].states.shape[1], []).append(index)
            self.seen[place] = max(self.seen[place], num)
            for _, indices in sorted(lengths.items()):
                if count := bisect_left(indices, num):
                    yield bucket.share * count / num, (entries, indices, count)

    def num_there(self, step: int, num_clips: int) -> int:
        """How many of a bucket's clips the step may draw from."""
        if step >= self.num_growing:
            return num_clips
        return min(NUM_PER_SHARD * math.ceil((step + 1) / self.num_growing * num_clips / NUM_PER_SHARD), num_clips)


class DiTTask(FlowMatchingTask):
    """A new DiT, or one that goes on from another, and batches of drawn clips."""

    def __init__(self, recipe: DiTRecipe, config: MiVEConfig, dataset: Dataset):
        torch.manual_seed(recipe.seed)
        model = MiVEDiT(config, operations=nn, attention=training_attention(recipe))
        if recipe.start_from:
            weights = {key: value.float() for key, value in read_tensors(Path(recipe.start_from)).items()}
            model.load_state_dict(deepen(weights, config.num_blocks))
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

    def loss(self, step: int, batch: EditFeatures, generator: torch.Generator) -> dict[str, Tensor]:
        """The velocity's, and what the auxiliary heads add to it."""
        found = super().loss(step, batch, generator)
        if self.recipe.auxiliary_weight:
            with torch.autocast(torch.device(self.recipe.device).type, enabled=False):
                told = self.auxiliary.losses(batch.to(self.recipe.device))
            found |= {**told, "loss": found["loss"] + self.recipe.auxiliary_weight * sum(told.values())}
        return found


@torch.no_grad()
def channel_weights(vae: WholeClipVAE, power: float) -> Tensor:
    """(C,) of mean 1: the root mean square change of the pixels when one normalised channel is drawn anew, to a power."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(LATENT_CHANNELS, 3, 8, 8, generator=generator)
    changed = base.repeat(LATENT_CHANNELS, 1, 1, 1, 1)
    changed[range(LATENT_CHANNELS), range(LATENT_CHANNELS)] = torch.randn(base.shape, generator=generator)
    effect = (decode_clips(vae, changed) - decode_clips(vae, base[None])).square().mean(dim=(1, 2, 3, 4)).sqrt()
    weights = effect**power
    return weights / weights.mean()


@torch.no_grad()
def initialise(model: MiVEDiT) -> None:
    """Wan's own scheme: Xavier for linear layers, small time layers, a head that starts at zero."""
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
    """Ours, for a DiT without a pretrained backbone: the stream carries noisy and source patches, the head reads their difference.

    x_t - source is t times the velocity wherever the edit keeps the source, so the copy is there at once and only the edit is
    to be learned. `branch` scales what the blocks add at first. The width must hold both patches (2 * 4 * C).
    """
    config = model.config
    channels, size = config.latent_channels, math.prod(config.patch_size) * config.latent_channels
    if 2 * size > config.width:
        raise UserError("the width does not hold a noisy and a source patch", got=config.width, expected=f"at least {2 * size}")
    carry = torch.eye(size).unflatten(1, (*config.patch_size, channels)).movedim(-1, 1)  # (py px c), as the head has them
    weight = model.patch_embedding.weight
    weight[: 2 * size] = 0
    weight[:size, :channels] = carry
    weight[size : 2 * size, channels:] = carry
    model.head.head.weight[:, :size] = gain * torch.eye(size)
    model.head.head.weight[:, size : 2 * size] = -gain * torch.eye(size)
    for block in model.blocks:
        block.self_attn.o.weight.mul_(branch)
        block.ffn[2].weight.mul_(branch)
        block.modulation[:, [2, 5]] *= branch


def deepen(weights: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """A DiT's state spread over more blocks: each new one is its predecessor with branches that end in zero, so nothing changes yet."""
    known = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    places = [i * num_blocks // known for i in range(known)]
    deeper = {key: value for key, value in weights.items() if not key.startswith("blocks.")}
    for place in range(num_blocks):
        origin = max(i for i in range(known) if places[i] <= place)
        for key, value in weights.items():
            if key.startswith(f"blocks.{origin}."):
                name = key.split(".", 2)[2]
                silent = place not in places and name.startswith(("self_attn.o.", "ffn.2."))
                deeper[f"blocks.{place}.{name}"] = torch.zeros_like(value) if silent else value.clone()
    return deeper


def check_auxiliary(recipe: DiTRecipe, num_blocks: int, where: object) -> None:
    """Raises UserError for auxiliary heads that cannot be put on."""
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
    """A recipe's values -> the task; computes the features that are missing first."""
    recipe = parse_recipe(DiTRecipe, values, where)
    check(recipe, where)
    config = PRESETS[recipe.preset]
    config = replace(config, layers=parse_layers(recipe.layers, config.vlm_num_layers), num_blocks=recipe.num_blocks or config.num_blocks)
    check_auxiliary(recipe, config.num_blocks, where)
    if recipe.growth_ratio and recipe.num_workers:
        raise UserError("clips that grow are read where they are waited for", where=where, got=f"num_workers {recipe.num_workers}", fix="set num_workers to 0")
    buckets = [
        Bucket((width, height), num_frames, num_clips, share, *map(tuple, chosen)) for width, height, num_frames, num_clips, share, *chosen in recipe.buckets
    ]
    clips = compute(
        [
            shards_of(
                bucket, vae=recipe.vae, vlm=recipe.vlm, config=config, seed=recipe.features_seed, folder=recipe.features_dir, things=recipe.auxiliary_weight > 0
            )
            for bucket in buckets
        ],
        recipe.num_feature_processes,
    )
    num_growing = round(recipe.growth_ratio * recipe.num_steps)
    entries = clips if num_growing else wait(clips)
    return DiTTask(recipe, config, FeatureBatches(list(zip(buckets, entries)), recipe.batch_size, recipe.seed, recipe.num_same_size, num_growing))
