"""The embedded VAE: Wan 2.1's network, narrow, trained on drawn scenes and natural pictures in motion.

The colour path: three channels of the residual stream carry +RGB, three -RGB, one a constant. At the start
it is exact and linear from pixels to pixels (8 x 8 means), and training adds the rest around it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..formats.safetensors_file import write_tensors
from ..train.loop import Task
from ..train.optim import Muon
from ..train.recipe import Recipe, parse_recipe
from ..vae import LATENTS_MEAN, LATENTS_STD
from .vae_clips import ClipCrops, Phase
from .vae_network import AttentionBlock, Downsample, ResidualBlock, Upsample, WholeClipVAE, read_whole_clip_vae, skip_empty_branches
from .vae_pca_init import initialise_from_pca

PATH_CHANNELS = 7  # +RGB, -RGB, constant
LOG_MSE_EPS = 1e-5  # under a clip's mean square error, 56 dB: what is near perfect asks for no more
CONSTANT = 3.0  # what the constant channel carries; large against colours, so the heads' norms stay near linear


@dataclass(frozen=True, kw_only=True)
class VAERecipe(Recipe):
    dim: int = 8  # width of the first level
    num_clips: int = 1600  # in the pool
    natural_ratio: float = 0.5  # of the pool; the rest is drawn
    phases: tuple = ((0.2, 2, 9, 32), (0.6, 1, 9, 64), (1.0, 1, 17, 64))  # until (fraction), batch, frames, pixels
    muon_learning_rate: float = 3e-3
    adamw_learning_rate: float = 6e-4
    num_warmup_steps: int = 100  # steps
    l1_weight: float = 1.0
    mse_weight: float = 2.0
    edges_weight: float = 0.5
    blocks_weight: float = 2.0
    log_mse_weight: float = 0.0  # of ln(mse) of each clip, which is what its PSNR measures
    kl_weight: float = 5e-4
    max_growth: float = 1.25  # of a stream weight's norm over its initial one
    num_statistics_clips: int = 96  # clips that the latents' mean and deviation are measured on
    num_basis_clips: int = 0  # clips whose principal components are the start; 0: the colour path
    frozen_encoder: bool = False  # the encoder stays as it starts, so latents are known before the training
    start_from: str = ""  # an exported VAE: its encoder stays bit for bit, so do latents, and the decoder learns on


class VAETask(Task):
    """Implements loop.Task."""

    def __init__(self, recipe: VAERecipe):
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.dataset = ClipCrops(
            Path(recipe.output_dir), recipe.num_clips, recipe.num_steps, tuple(Phase(*phase) for phase in recipe.phases), recipe.seed, recipe.natural_ratio
        )
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
        learned = [p for p in self.vae.parameters() if p.requires_grad]
        matrices = [p for p in learned if p.ndim >= 4 and min(p.flatten(1).shape) > 1 and not _is_gamma(p)]
        chosen = {id(p) for p in matrices}
        self.optimizers = {
            "muon": Muon(matrices, lr=recipe.muon_learning_rate),
            "adamw": torch.optim.AdamW([p for p in learned if id(p) not in chosen], lr=recipe.adamw_learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
        }
        self.bounds = [(weight, weight.detach().norm() * recipe.max_growth) for weight in stream_weights(self.vae) if weight.requires_grad]

    def clips(self, num_clips: int) -> Tensor:
        """(B, F, H, W, 3) uint8, the first of the pool."""
        return torch.from_numpy(self.dataset.pool[:num_clips].copy())

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.recipe.num_warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / self.recipe.num_steps))

    def loss(self, step: int, batch: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """(B, F, H, W, 3) uint8 -> the training loss and its parts."""
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
        for weight, bound in self.bounds:
            weight.mul_((bound / weight.norm()).clamp(max=1.0))

    @torch.no_grad()
    def export(self, path: Path) -> None:
        """Original key names, fp16, normalised latents of zero mean and unit variance."""
        weights = {key: value.clone() for key, value in self.vae.state_dict().items()}
        if not self.recipe.start_from:
            fold_statistics(weights, *self.latent_statistics())
        write_tensors(
            path,
            {key: value.half() for key, value in weights.items()},
            {"format": "pt", "mive.about": f"Wan 2.1 VAE layout, dim {self.recipe.dim}", **self.recipe.about},
        )

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel, (C,) each, over clips of the pool."""
        clips = (self.dataset.pool[i % self.recipe.num_clips] for i in range(self.recipe.num_statistics_clips))
        means = torch.cat([self.vae.encode(as_video(torch.from_numpy(clip.copy())[None]))[0].flatten(2)[0] for clip in clips], dim=1)
        return means.mean(1), means.std(1)


def build(values: Mapping, where: object = None) -> VAETask:
    return VAETask(parse_recipe(VAERecipe, values, where))


def as_video(frames: Tensor) -> Tensor:
    """(B, F, H, W, 3) uint8 -> (B, 3, F, H, W) in -1..1."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def distortion(output: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Differences of pixels, of edges and of 8 x 8 means, and ln(mse) clip by clip: (B, 3, F, H, W) twice -> scalars."""
    error = output - video
    edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)) / 3
    blocks = F.avg_pool2d(error.transpose(1, 2).flatten(0, 1), 8).abs().mean()
    log_mse = (error.square().flatten(1).mean(1) + LOG_MSE_EPS).log().mean()
    return {"l1": error.abs().mean(), "mse": error.square().mean(), "edges": edges, "blocks": blocks, "log_mse": log_mse}


def fold_statistics(weights: dict[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Rescales conv1 and conv2 in place, so that latents of this mean and std (C,) get Wan 2.1's."""
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
    return all(n == 1 for n in parameter.shape[1:])


def stream_weights(vae: WholeClipVAE) -> Iterator[Tensor]:
    """Weights that the residual stream passes through; their growth would drown the branches."""
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
    """An exact linear colour path from pixels to latents 0-2 and back, faint random weights elsewhere."""
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            conv = module.residual[6]
            conv.weight.mul_(0.3)
            conv.weight[:PATH_CHANNELS].mul_(0.05)
            conv.bias.zero_()
        if isinstance(module, ResidualBlock) and module.shortcut is not None:
            _carry(module.shortcut, module.shortcut.weight[:, :, 0, 0, 0])
        if isinstance(module, AttentionBlock):
            module.proj.weight.mul_(0.1)
            module.proj.weight[:PATH_CHANNELS].mul_(0.05)
            module.proj.bias.zero_()
        if isinstance(module, Downsample):
            conv = module.resample[1]
            _carry(conv, *(conv.weight[:, :, i, j] for i in (0, 1) for j in (0, 1)))
            if module.time_conv is not None:
                _carry(module.time_conv, *(module.time_conv.weight[:, :, i, 0, 0] for i in (1, 2)))
        if isinstance(module, Upsample):
            _carry(module.resample[1], module.resample[1].weight[:, :, 1, 1])
            if module.time_conv is not None:
                first, second = module.time_conv.weight[:, :, 2, 0, 0].chunk(2)
                _carry(module.time_conv, first, second, shares=1)
    _enter(vae.encoder.conv1)
    _enter(vae.decoder.conv1)
    _leave(vae.encoder.head)
    _leave(vae.decoder.head)
    latents = vae.conv2.in_channels
    vae.encoder.head[2].weight[latents:].mul_(0.1)
    vae.encoder.head[2].bias[latents:] = -6.0  # little noise at the start
    for conv in (vae.conv1, vae.conv2):
        conv.weight.copy_(torch.eye(conv.in_channels).view_as(conv.weight))
        conv.bias.zero_()


def _carry(conv: nn.Module, *taps: Tensor, shares: int | None = None) -> None:
    """Sets the taps (out, in) to an identity that adds up to one, over faint random weights; the path is exact."""
    conv.weight.mul_(0.3)
    for start in range(0, conv.weight.shape[0], taps[0].shape[0]):
        conv.weight[start : start + PATH_CHANNELS] = 0
    conv.bias.zero_()
    for tap in taps:
        n = min(tap.shape)
        tap[range(n), range(n)] = 1 / (shares or len(taps))


def _enter(conv: nn.Module) -> None:
    """Colours (inputs 0-2) onto the path; a constant from the bias."""
    conv.weight[:PATH_CHANNELS] = 0
    conv.bias[:PATH_CHANNELS] = 0
    for colour in range(3):
        conv.weight[colour, colour, 2, 1, 1] = 1
        conv.weight[colour + 3, colour, 2, 1, 1] = -1
    conv.bias[6] = CONSTANT


def _leave(head: nn.Sequential) -> None:
    """silu(x) - silu(-x) = x: the path's colours come out of norm and activation unbent."""
    norm, _, conv = head
    norm.gamma.fill_(math.sqrt(CONSTANT**2 + 1.5) / math.sqrt(len(norm.gamma)))
    conv.weight[:3] = 0
    conv.bias.zero_()
    for colour in range(3):
        conv.weight[colour, colour, 2, 1, 1] = 1
        conv.weight[colour, colour + 3, 2, 1, 1] = -1
