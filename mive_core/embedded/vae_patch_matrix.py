"""A VAE encoder without active branches as one matrix on patches of 8 x 8 pixels and 1 or 4 frames.

Such an encoder is linear up to its head. The matrix gives the same latents and is about thirty times as fast on a CPU.
B batch, F pixel frames (4n+1), T latent frames, C latent channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from .vae_network import AttentionBlock, ResidualBlock, WholeClipVAE, encode_clips, normalise

Encoder = Callable[[Tensor], Tensor]  # (B, F, H, W, 3) in 0..1 -> normalised latents (B, C, T, H/8, W/8)
SIDE, NUM_FRAMES = 8, 4  # of a patch; the first frame has patches of its own


@dataclass(frozen=True)
class PatchMatrix:
    """The encoder's stream before the head as an affine function of a patch; head and posterior are the VAE's own."""

    vae: WholeClipVAE
    first: Tensor  # (8 * 8 * 3, channels)
    later: Tensor  # (4 * 8 * 8 * 3, channels)
    offsets: Tensor  # (2, channels) stream of a gray patch, in the first and in later frames

    @classmethod
    @torch.inference_mode()
    def from_vae(cls, vae: WholeClipVAE) -> "PatchMatrix | None":
        """Measures the matrix with one unit impulse per input value; returns None if the encoder is not linear up to its head."""
        if any(module.active for module in vae.encoder.modules() if isinstance(module, (ResidualBlock, AttentionBlock))):
            return None
        shape = (1 + NUM_FRAMES, SIDE, SIDE, 3)
        impulses = torch.cat([torch.zeros(1, *shape), torch.eye(torch.Size(shape).numel()).view(-1, *shape)])
        stream = vae.encoder.stream(rearrange(impulses, "b f h w c -> (f b) c h w").contiguous(), len(impulses))
        stream = rearrange(stream, "(t b) c 1 1 -> b t c", t=2)
        offsets, slopes = stream[0], (stream[1:] - stream[0]).unflatten(0, (1 + NUM_FRAMES, -1))
        return cls(vae, slopes[0, :, 0].contiguous(), slopes[1:, :, 1].flatten(0, 1).contiguous(), offsets)

    def encode(self, frames: Tensor) -> Tensor:
        """Encodes (B, F, H, W, 3) in 0..1 -> normalised (B, C, T, H/8, W/8)."""
        video = frames * 2 - 1
        first = rearrange(video[:, :1], "b t (y h) (x w) c -> t b y x (h w c)", h=SIDE, w=SIDE) @ self.first + self.offsets[0]
        later = rearrange(video[:, 1:], "b (t f) (y h) (x w) c -> t b y x (f h w c)", f=NUM_FRAMES, h=SIDE, w=SIDE) @ self.later + self.offsets[1]
        stream = rearrange(torch.cat([first, later]), "t b y x c -> (t b) c y x")
        return normalise(self.vae.posterior(stream, len(frames))[0])


def encoder_of(vae: WholeClipVAE) -> Encoder:
    """Returns the fastest exact implementation of the VAE's encoder."""
    matrix = PatchMatrix.from_vae(vae)
    return matrix.encode if matrix else lambda frames: encode_clips(vae, frames)
