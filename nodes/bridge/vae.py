"""A stock Wan 2.1 VAE under ComfyUI's memory management, which encodes in tiles if memory is short.

F frames of H x W pixels; C latent channels, T x Y x X latent grid.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import comfy.latent_formats
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ...mive_core.errors import UserError
from ...mive_core.vae import LATENT_CHANNELS


def encode(vae, frames: Tensor) -> Tensor:
    """(F, H, W, 3) in 0..1 -> raw latents (1, C, T, Y, X). Raises UserError if they are not finite."""
    latents = vae.encode(frames)
    if not latents.isfinite().all():
        raise UserError("the VAE gives NaN or infinity", where="vae", fix="start ComfyUI with --fp32-vae or --bf16-vae, or download the VAE again")
    return latents


def decode(vae, latents: Tensor) -> Tensor:
    """Raw latents (1, C, T, Y, X), or those of F images -> (F, H, W, 3) in 0..1, on the CPU."""
    decoded = vae.decode(latents)
    return decoded.reshape(-1, *decoded.shape[-3:]).float().cpu()


def round_trip(vae, frames: Tensor) -> Tensor:
    """(F, H, W, 3) in 0..1 -> the same shape, encoded and decoded. Raises UserError if the latents are not finite.

    Takes any VAE, of videos or of images: frames, rows and columns are repeated at the end up to a number that it takes, then cut again.
    """
    num_frames, height, width = frames.shape[:3]
    temporal, spatial = vae.temporal_compression_decode() or 1, vae.spacial_compression_encode()
    times = torch.arange(num_frames + -(num_frames - 1) % temporal).clamp(max=num_frames - 1)
    rows, columns = (torch.arange(side + -side % spatial).clamp(max=side - 1) for side in (height, width))
    return decode(vae, encode(vae, frames[times][:, rows][:, :, columns]))[:num_frames, :height, :width]


@dataclass(frozen=True)
class HostedVAE:
    """A VAE file that is loaded when the first clip is encoded."""

    path: Path

    @cached_property
    def vae(self) -> comfy.sd.VAE:
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(self.path), safe_load=True))

    def encode(self, frames: Tensor) -> Tensor:
        """(F, H, W, 3) in 0..1 -> normalised latents (1, C, T, Y, X), like the library's VAE. Raises UserError if it is no Wan 2.1 VAE."""
        latents = encode(self.vae, frames)
        if latents.shape[1] != LATENT_CHANNELS:
            raise UserError("this is not a Wan 2.1 VAE", where=self.path, got=f"{latents.shape[1]} latent channels", expected=LATENT_CHANNELS)
        return comfy.latent_formats.Wan21().process_in(latents)
