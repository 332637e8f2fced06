"""Wan 2.1's VAE: video <-> normalised latents, by diffusers' AutoencoderKLWan.

B batch, F pixel frames (4n+1), H x W pixels (multiples of 16); C = 16 latent channels,
T = (F - 1) / 4 + 1 latent frames, Y = H / 8, X = W / 8.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .config import SIZE_MULTIPLE, TEMPORAL_FACTOR
from .conv3d import use_conv2d
from .errors import UserError
from .formats.safetensors_file import read_tensors
from .media.paths import check_input

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# Wan 2.1's normalisation of its latents, per channel.
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
LATENT_CHANNELS = 16

ORIGINAL_KEY, DIFFUSERS_KEY = "encoder.conv1.weight", "encoder.conv_in.weight"
OTHER_MODELS = {  # a key that identifies another model -> what the file then is
    "encoder.downsamples.0.downsamples.0.residual.0.gamma": "a Wan 2.2 VAE (48 latent channels)",
    "encoder.down.0.block.0.conv1.weight": "an image VAE of the Stable Diffusion or FLUX family",
    "encoder.down_blocks.0.resnets.0.conv1.conv.weight": "a HunyuanVideo or LTX VAE",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "an image VAE in diffusers' layout",
    "patch_embedding.weight": "a Wan diffusion model",
    "model.diffusion_model.patch_embedding.weight": "a Wan diffusion model",
    "model.embed_tokens.weight": "a language model",
    "model.language_model.embed_tokens.weight": "a vision-language model",
}


class VAE:
    """The frozen VAE. Latents are normalised to about zero mean and unit variance per channel."""

    def __init__(self, network: AutoencoderKLWan):
        parameter = next(network.parameters())
        self.network = network.eval().requires_grad_(False)
        self.mean = torch.tensor(LATENTS_MEAN).to(parameter).view(1, -1, 1, 1, 1)
        self.std = torch.tensor(LATENTS_STD).to(parameter).view(1, -1, 1, 1, 1)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
        """Loads a .safetensors file, or a diffusers folder with one inside.

        Reads the original (ComfyUI) and diffusers key layouts, any width, fp32, bf16 or fp16.
        Raises UserError if the file is not a complete Wan 2.1 VAE.
        """
        path = _weights_file(check_input(path, "VAE"))
        weights = {key: value.to(device, dtype) for key, value in read_tensors(path).items()}
        return cls(_build_network(weights, path))

    def encode(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) or (B, F, H, W, 3) in 0..1 -> (B, C, T, Y, X), the normalised posterior mean.

        Raises UserError for sizes and frame counts that the VAE does not support, and for values that are not finite.
        """
        frames = frames[None] if frames.ndim == 4 else frames
        _check_frames(frames)
        video = frames.permute(0, 4, 1, 2, 3)
        if self.network.use_tiling:
            return (self.network.encode(video.to(self.mean) * 2 - 1).latent_dist.mode() - self.mean) / self.std
        return (self._run_encoder(video).chunk(2, dim=1)[0] - self.mean) / self.std

    def _run_encoder(self, video: Tensor) -> Tensor:
        """AutoencoderKLWan's own loop over latent frames, each converted when it is its turn -> (B, 2 C, T, Y, X), mean and log-variance."""
        caches = _caches(self.network.encoder)
        pieces = video.tensor_split(tuple(range(1, video.shape[2], TEMPORAL_FACTOR)), dim=2)
        return self.network.quant_conv(torch.cat([self.network.encoder(x.to(self.mean) * 2 - 1, feat_cache=caches, feat_idx=[0]) for x in pieces], dim=2))

    def decode_pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """(1, C, T, Y, X) -> the frames of one latent frame after the other, (1, H, W, 3), then (4, H, W, 3), as `decode` returns them.

        Memory holds one piece and what the causal convolutions remember of the one before. Several clips may be decoded in turns.
        Raises UserError as `decode` does.
        """
        _check_one_clip(latents)
        return (piece[0] for piece in self._decode(latents))

    def decode(self, latents: Tensor) -> Tensor:
        """(1, C, T, Y, X) -> (F, H, W, 3) float32 in 0..1. Raises UserError for anything but one finite clip."""
        _check_one_clip(latents)
        return self.decode_batch(latents)[0]

    def decode_batch(self, latents: Tensor) -> Tensor:
        """(B, C, T, Y, X) -> (B, F, H, W, 3) float32 in 0..1. Raises UserError for anything but finite latents."""
        return torch.cat(list(self._decode(latents)), dim=1)

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        """(B, C, T, Y, X) -> (B, 1, H, W, 3), then (B, 4, H, W, 3) for every further latent frame; in tiles all at once."""
        _check_latents(latents)
        latents = latents.to(self.mean) * self.std + self.mean
        return map(_to_frames, [self.network.decode(latents, return_dict=False)[0]] if self.network.use_tiling else self._run_decoder(latents))

    def _run_decoder(self, latents: Tensor) -> Iterator[Tensor]:
        """AutoencoderKLWan's own loop over latent frames, with the convolutions' caches held here: it concatenates all frames."""
        caches = _caches(self.network.decoder)
        for index, latent in enumerate(self.network.post_quant_conv(latents).split(1, dim=2)):
            yield self.network.decoder(latent, feat_cache=caches, feat_idx=[0], first_chunk=not index)


def _caches(network: nn.Module) -> list[None]:
    """Room for what each causal convolution remembers."""
    return [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules())


def _to_frames(video: Tensor) -> Tensor:
    """(B, 3, F, H, W) in -1..1 -> (B, F, H, W, 3) float32 in 0..1."""
    return (video.float().clamp(-1, 1) + 1).mul_(0.5).permute(0, 2, 3, 4, 1).contiguous()


def _check_one_clip(latents: Tensor) -> None:
    if latents.ndim != 5 or len(latents) != 1:
        raise UserError("not the latents of one clip", got=f"shape {tuple(latents.shape)}", expected="(1, 16, T, Y, X)")


def _check_latents(latents: Tensor) -> None:
    if latents.ndim != 5 or latents.shape[1] != LATENT_CHANNELS or 0 in latents.shape:
        raise UserError("not Wan 2.1 latents", got=f"shape {tuple(latents.shape)}", expected="(B, 16, T, Y, X)")
    if not latents.isfinite().all():
        raise UserError("the latents are not finite", got="NaN or infinity", fix="sample in float32 or bfloat16, or check the weights")


def _check_frames(frames: Tensor) -> None:
    if frames.ndim != 5 or frames.shape[-1] != 3 or not frames.is_floating_point():
        raise UserError("not video frames", got=f"{frames.dtype} of shape {tuple(frames.shape)}", expected="floats (F, H, W, 3) in 0..1")
    num_frames, height, width = frames.shape[1:4]
    if num_frames % TEMPORAL_FACTOR != 1:
        raise UserError(
            "the VAE cannot hold this number of frames",
            got=num_frames,
            expected="4n+1 (1, 5, 9, 13, 17, ...)",
            fix=f"keep the first {max(num_frames - 1, 0) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1}" if num_frames else None,
        )
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not height or not width:
        raise UserError("the VAE cannot hold this size", got=f"{width}x{height}", expected=f"multiples of {SIZE_MULTIPLE}")
    if not frames.isfinite().all():
        raise UserError("the frames are not finite", got="NaN or infinity", expected="values in 0..1")


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError("cannot tell which file is the VAE", where=folder, got=f"{len(files)} .safetensors files", expected="one")
        return files[0]
    if path.suffix != ".safetensors":
        raise UserError(
            "unsupported file type",
            where=path,
            got=repr(path.suffix),
            expected=".safetensors",
            fix="convert pickled weights with safetensors first: they can run code when read",
        )
    return path


def _build_network(weights: dict[str, Tensor], path: Path) -> AutoencoderKLWan:
    """Builds diffusers' model from weights in either layout, with its widths taken from their shapes. Raises UserError."""
    # silences warnings about unknown torchao tensors; a VAE has none
    logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(logging.ERROR)
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if ORIGINAL_KEY in weights:
        weights = convert_wan_vae_to_diffusers(weights)
    widths = [weights[key].shape[0] for key in (DIFFUSERS_KEY, "decoder.norm_out.gamma", "post_quant_conv.weight") if key in weights]
    if len(widths) < 3 or any(key in weights for key in OTHER_MODELS if key.startswith("encoder.downsamples")):
        raise UserError("not a Wan 2.1 VAE", where=path, got=_describe(weights), expected="a Wan 2.1 VAE, such as Wan2.1_VAE.safetensors")
    if widths[2] != LATENT_CHANNELS or weights[DIFFUSERS_KEY].shape[1] != 3:
        raise UserError(
            "not a Wan 2.1 VAE", where=path, got=f"{widths[2]} latent channels, {weights[DIFFUSERS_KEY].shape[1]} input channels", expected="16 and 3"
        )
    with torch.device("meta"):
        network = AutoencoderKLWan(base_dim=widths[0], decoder_base_dim=widths[1])
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    mismatched = sorted(key for key in shapes.keys() | weights.keys() if key not in weights or weights[key].shape != shapes.get(key))
    if mismatched:
        raise UserError(
            "this Wan 2.1 VAE is not whole",
            where=path,
            expected=f"{len(shapes)} tensors of width {widths[0]}",
            got=f"{len(mismatched)} missing, unknown or of another shape, such as {mismatched[0]}",
        )
    network.load_state_dict(weights, assign=True)
    if weights[DIFFUSERS_KEY].device.type == "cpu":
        use_conv2d(network)
        use_rsqrt_norms(network)
    return network


def _describe(weights: dict[str, Tensor]) -> str:
    known = next((name for key, name in OTHER_MODELS.items() if key in weights), None)
    return known or (f"{len(weights)} tensors, such as {min(weights)!r}" if weights else "an empty file")


def use_rsqrt_norms(network: nn.Module) -> None:
    """Makes the network's RMS norms over channels multiply by a reciprocal root instead of dividing: a third of the time on a CPU, equal to 1e-6."""
    for module in network.modules():
        if type(module).__name__ == "WanRMS_norm":
            module.__class__ = type("RsqrtRMSNorm", (type(module),), {"forward": _rsqrt_norm})


def _rsqrt_norm(self, x: Tensor) -> Tensor:
    if not self.channel_first or x.dtype != torch.float32:
        return super(type(self), self).forward(x)
    inverse = torch.einsum("bc...,bc...->b...", x, x).clamp_min(1e-24).rsqrt().unsqueeze(1)
    return (x * inverse).mul_(self.gamma * self.scale) + self.bias
