"""Task vae: trains the embedded VAE, a narrow Wan 2.1 network, on synthetic scenes and moving natural pictures.

Without PCA the network is initialised with a colour path: three channels of the residual stream carry +RGB, three -RGB,
one a constant. This path maps pixels exactly and linearly to their 8 x 8 means; training adds everything else.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.safetensors_file import write_tensors
from ..train.launcher import num_batches
from ..train.loop import Task
from ..train.optim import Muon
from ..train.recipe import Recipe, parse_recipe
from ..vae import LATENTS_MEAN, LATENTS_STD
from .vae_clips import ClipCrops, Phase
from .vae_network import AttentionBlock, Downsample, ResidualBlock, Upsample, WholeClipVAE, read_whole_clip_vae, skip_empty_branches
from .vae_pca_init import initialise_from_pca

PATH_CHANNELS = 7  # +RGB, -RGB, constant
LOG_MSE_EPS = 1e-5  # added to a clip's MSE before the logarithm (56 dB), so that nearly perfect clips get little gradient
CONSTANT = 3.0  # value of the constant channel; larger than colours, so the norms before the heads stay nearly linear


@dataclass(frozen=True, kw_only=True)
class VAERecipe(Recipe):
    """Recipe of the embedded VAE's training."""

    dim: int = 8  # width of the first level
    num_clips: int = 1600  # clips in the pool
    natural_ratio: float = 0.5  # fraction of natural pictures in the pool; the rest is synthetic
    phases: tuple = ((0.2, 2, 9, 32), (0.6, 1, 9, 64), (1.0, 1, 17, 64))  # (end as a fraction of the run, batch, frames, pixels) each
    muon_learning_rate: float = 3e-3  # peak learning rate of Muon, for matrices
    adamw_learning_rate: float = 6e-4  # peak learning rate of AdamW, for all other weights
    num_warmup_steps: int = 100  # steps of linear learning rate warmup
    l1_weight: float = 1.0  # loss weights, see distortion
    mse_weight: float = 2.0
    edges_weight: float = 0.5
    blocks_weight: float = 2.0
    log_mse_weight: float = 0.0
    kl_weight: float = 5e-4  # loss weight of the KL divergence
    max_growth: float = 1.25  # upper bound on the norm of each stream weight, relative to its initial norm
    num_statistics_clips: int = 96  # clips on which the latents' mean and standard deviation are measured
    num_basis_clips: int = 0  # clips of the PCA that initialises the network; 0: the colour path
    frozen_encoder: bool = False  # training of the decoder only, so that latents are known beforehand
    start_from: str = ""  # exported VAE whose decoder is trained further; its encoder, hence the latents, stay equal bit for bit


class VAETask(Task):
    """The training loop's task for the embedded VAE."""

    recipe: VAERecipe
    dataset: ClipCrops

    def __init__(self, recipe: VAERecipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        phases = tuple(Phase(*phase) for phase in recipe.phases)
        total = num_batches(recipe.num_steps, recipe.gradient_accumulation_steps)
        self.dataset = ClipCrops(Path(recipe.output_dir), recipe.num_clips, total, phases, recipe.seed, recipe.natural_ratio)
        self.vae = read_whole_clip_vae(recipe.start_from) if recipe.start_from else WholeClipVAE(recipe.dim)
        if recipe.num_basis_clips and not recipe.start_from:
            initialise_from_pca(self.vae, as_video(self.clips(recipe.num_basis_clips)))
        elif not recipe.start_from:
            initialise(self.vae)
        self.frozen = recipe.frozen_encoder or bool(recipe.start_from)
        if self.frozen:
            self.vae.encoder.requires_grad_(False)
            self.vae.conv1.requires_grad_(False)
            skip_empty_branches(self.vae.encoder)
        self.modules = {"vae": self.vae}
        trainable = [p for p in self.vae.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim >= 4 and min(p.flatten(1).shape) > 1 and not _is_gamma(p)]
        muon_ids = {id(p) for p in matrices}
        self.optimizers = {
            "muon": Muon(matrices, lr=recipe.muon_learning_rate),
            "adamw": torch.optim.AdamW([p for p in trainable if id(p) not in muon_ids], lr=recipe.adamw_learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
        }
        self.bounds = [(weight, weight.detach().norm() * recipe.max_growth) for weight in stream_weights(self.vae) if weight.requires_grad]

    def clips(self, num_clips: int) -> Tensor:
        """Returns the first clips of the pool, (B, F, H, W, 3) uint8."""
        return torch.from_numpy(self.dataset.pool[:num_clips].copy())

    def lr_factor(self, step: int) -> float:
        """Linear warmup times a cosine decay."""
        return min(1.0, (step + 1) / self.recipe.num_warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / self.recipe.num_steps))

    def loss(self, step: int, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Computes the training loss, its parts and the PSNR of a batch (B, F, H, W, 3) uint8."""
        video = as_video(batch)
        with torch.set_grad_enabled(not self.frozen), torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16 and not self.frozen):
            mean, log_variance = self.vae.encode(video)
        log_variance = log_variance.clamp(-20, 5)
        latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        parts = distortion(self.vae.decode(latents), video) | {"kl": kl}
        loss = sum(getattr(self.recipe, f"{name}_weight") * part for name, part in parts.items())
        return {"loss": loss, "psnr": -10 * (parts["mse"] / 4).log10()} | parts

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bounds the norms of the stream weights."""
        for weight, bound in self.bounds:
            weight.mul_((bound / weight.norm()).clamp(max=1.0))

    @torch.no_grad()
    def export(self, path: Path) -> None:
        """Writes the VAE with original key names in fp16; normalised latents have zero mean and unit variance."""
        weights = {key: value.clone() for key, value in self.vae.state_dict().items()}
        if not self.recipe.start_from:
            fold_statistics(weights, *self.latent_statistics())
        write_tensors(
            path,
            {key: value.half() for key, value in weights.items()},
            {"format": "pt", "mive.about": f"Wan 2.1 VAE layout, dim {self.recipe.dim}", **self.recipe.metadata},
        )

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of each latent channel, (C,) each, over clips of the pool."""
        clips = (self.dataset.pool[i % self.recipe.num_clips] for i in range(self.recipe.num_statistics_clips))
        means = torch.cat([self.vae.encode(as_video(torch.from_numpy(clip.copy())[None]))[0].flatten(2)[0] for clip in clips], dim=1)
        return means.mean(1), means.std(1)


def build(values: Mapping, where: object = None) -> VAETask:
    """Builds the task from a recipe's values."""
    return VAETask(parse_recipe(VAERecipe, values, where))


def as_video(frames: Tensor) -> Tensor:
    """Converts (B, F, H, W, 3) uint8 -> (B, 3, F, H, W) in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def distortion(output: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Returns the reconstruction losses of (B, 3, F, H, W) twice, as scalars.

    l1, mse: of pixels; edges: of differences between neighbours; blocks: of 8 x 8 means; log_mse: mean of ln(mse) of each clip, as in PSNR.
    """
    error = output - video
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)) / 3
    blocks = F.avg_pool2d(error.transpose(1, 2).flatten(0, 1), 8).abs().mean()
    log_mse = (error.square().flatten(1).mean(1) + LOG_MSE_EPS).log().mean()
    return {"l1": error.abs().mean(), "mse": error.square().mean(), "edges": edges, "blocks": blocks, "log_mse": log_mse}


def fold_statistics(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Rescales conv1 and conv2 in place so that latents with this mean and std (C,) have those of Wan 2.1."""
    wan_mean, wan_std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    scale = wan_std / std
    shift = wan_mean - mean * scale
    num = len(mean)
    out_scale = torch.cat([scale, torch.ones(num)])
    weights["conv1.weight"] = weights["conv1.weight"] * out_scale.view(-1, 1, 1, 1, 1)
    weights["conv1.bias"] = weights["conv1.bias"] * out_scale + torch.cat([shift, 2 * scale.log()])
    inverse = weights["conv2.weight"] / scale.view(1, -1, 1, 1, 1)
    weights["conv2.weight"] = inverse
    weights["conv2.bias"] = weights["conv2.bias"] - inverse[:, :, 0, 0, 0] @ shift


def _is_gamma(parameter: Tensor) -> bool:
    """Whether a parameter is the scale of an RMSNorm."""
    return all(n == 1 for n in parameter.shape[1:])


def stream_weights(vae: WholeClipVAE) -> Iterator[Tensor]:
    """Yields the weights on the residual stream itself; if they grew, the branches would lose their influence."""
    yield vae.encoder.conv1.weight
    yield vae.decoder.conv1.weight
    for module in vae.modules():
        if isinstance(module, ResidualBlock) and module.shortcut is not None:
            yield module.shortcut.weight
        if isinstance(module, (Downsample, Upsample)):
            yield module.resample[1].weight
            if module.time_conv is not None:
                yield module.time_conv.weight


@torch.no_grad()
def initialise(vae: WholeClipVAE) -> None:
    """Initialises an exact linear colour path from pixels to latents 0-2 and back, with small random weights elsewhere."""
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            conv = module.residual[6]
            conv.weight.mul_(0.3)
            conv.weight[:PATH_CHANNELS].mul_(0.05)
            conv.bias.zero_()
        if isinstance(module, ResidualBlock) and module.shortcut is not None:
            _set_identity(module.shortcut, module.shortcut.weight[:, :, 0, 0, 0])
        if isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.1)
            module.proj.weight[:PATH_CHANNELS].mul_(0.05)
            module.proj.bias.zero_()
        if isinstance(module, Downsample):
            conv = module.resample[1]
            _set_identity(conv, *(conv.weight[:, :, i, j] for i in (0, 1) for j in (0, 1)))
            if module.time_conv is not None:
                _set_identity(module.time_conv, *(module.time_conv.weight[:, :, i, 0, 0] for i in (1, 2)))
        if isinstance(module, Upsample):
            _set_identity(module.resample[1], module.resample[1].weight[:, :, 1, 1])
            if module.time_conv is not None:
                first, second = module.time_conv.weight[:, :, 2, 0, 0].chunk(2)
                _set_identity(module.time_conv, first, second, num_shares=1)
    _set_path_input(vae.encoder.conv1)
    _set_path_input(vae.decoder.conv1)
    _set_path_output(vae.encoder.head)
    _set_path_output(vae.decoder.head)
    latents = vae.conv2.in_channels
    vae.encoder.head[2].weight[latents:].mul_(0.1)
    vae.encoder.head[2].bias[latents:] = -6.0  # little initial noise
    for conv in (vae.conv1, vae.conv2):
        conv.weight.copy_(torch.eye(conv.in_channels).view_as(conv.weight))
        conv.bias.zero_()


def _set_identity(conv: nn.Module, *taps: Tensor, num_shares: int | None = None) -> None:
    """Sets each tap (out, in) to 1 / num_shares (default: their number) of an identity, over small random weights; the path's channels are exact."""
    conv.weight.mul_(0.3)
    for start in range(0, conv.weight.shape[0], taps[0].shape[0]):
        conv.weight[start : start + PATH_CHANNELS] = 0
    conv.bias.zero_()
    for tap in taps:
        n = min(tap.shape)
        tap[range(n), range(n)] = 1 / (num_shares or len(taps))


def _set_path_input(conv: nn.Module) -> None:
    """Writes the colours (inputs 0-2) and, by the bias, the constant to the path's channels."""
    conv.weight[:PATH_CHANNELS] = 0
    conv.bias[:PATH_CHANNELS] = 0
    for colour in range(3):
        conv.weight[colour, colour, 2, 1, 1] = 1
        conv.weight[colour + 3, colour, 2, 1, 1] = -1
    conv.bias[6] = CONSTANT


def _set_path_output(head: nn.Sequential) -> None:
    """Reads the colours from the path. Since silu(x) - silu(-x) = x, they pass norm and activation linearly."""
    norm, _, conv = head
    norm.gamma.fill_(math.sqrt(CONSTANT**2 + 1.5) / math.sqrt(len(norm.gamma)))
    conv.weight[:3] = 0
    conv.bias.zero_()
    for colour in range(3):
        conv.weight[colour, colour, 2, 1, 1] = 1
        conv.weight[colour, colour + 3, 2, 1, 1] = -1
