"""The MiVE diffusion transformer: self-attention over a single sequence.

B batch, C latent channels, T x Y x X latent grid, R references, K chosen layers, S = N_c condition tokens,
D_vlm their width, D model width, P blocks.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from ..attention import AttentionFn, CheckedAttention
from ..config import MiVEConfig
from .blocks import Block, Modulation, parameter_dtype
from .context import ContextProjection
from .rope import rotary_table


class MiVEDiT(nn.Module):
    """Predicts the velocity of the target latents from the source, the reference and the condition tokens (paper, stages 2 and 3).

    `operations` is torch.nn or a module with the same layers (ComfyUI's comfy.ops), `attention` an AttentionFn.
    """

    def __init__(self, config: MiVEConfig, *, operations, attention: AttentionFn, device=None, dtype=None):
        super().__init__()
        self.config = config
        factory_kwargs = {"device": device, "dtype": dtype}
        layer_kwargs = {**factory_kwargs, "operations": operations}
        width = config.width
        self.patch_embedding = operations.Conv3d(2 * config.latent_channels, width, kernel_size=config.patch_size, stride=config.patch_size, **factory_kwargs)
        self.context = ContextProjection(config.vlm_width, width, len(config.layers), config.eps, **layer_kwargs)
        self.time_embedding = nn.Sequential(
            operations.Linear(config.freq_dim, width, **factory_kwargs), nn.SiLU(), operations.Linear(width, width, **factory_kwargs)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), operations.Linear(width, 6 * width, **factory_kwargs))
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.ffn_width, config.eps, attention=attention, **layer_kwargs) for _ in range(config.num_blocks)
        )
        self.head = Head(width, config.latent_channels, config.patch_size, config.eps, **layer_kwargs)

    def compile_blocks(self) -> "MiVEDiT":
        """Applies torch.compile to each block and returns self. The blocks share one graph, since they differ in weights only.

        Hooks on blocks, and a CheckedAttention, stay out of the graph.
        """
        for block in self.blocks:
            if isinstance(block.self_attn.attention, CheckedAttention):
                block.self_attn.attention = torch.compiler.disable(block.self_attn.attention)
            block.forward = torch.compile(block.forward)
        return self

    def embed_condition(self, states: Tensor) -> Tensor:
        """(B, K, S, D_vlm) -> (B, N_c, D). Does not depend on t, so one call per sampling is enough."""
        return self.context(states, self.time_embedding[0].weight.dtype)

    def forward(
        self, noisy: Tensor, source: Tensor, reference: Tensor, condition: Tensor, t: Tensor, reference_times: Tensor | None = None, **attention_options
    ) -> Tensor:
        """noisy and source (B, C, T, Y, X), reference (B, C, R, Y, X), condition (B, N_c, D), t (B,) in 0..1 -> (B, C, T, Y, X).

        reference_times (B, R), see reference.latent_times, holds each reference's place among the target's latent frames; None: R = 1, the first.
        """
        latents = torch.cat([torch.cat([reference, noisy], dim=2), torch.cat([reference, source], dim=2)], dim=1)
        patches = self.patch_embedding(latents)
        grid = (patches.shape[2] - reference.shape[2], *patches.shape[3:])
        num_clean = condition.shape[1] + reference.shape[2] * math.prod(grid[1:])

        sequence = torch.cat([condition, patches.flatten(2).transpose(1, 2)], dim=1)
        del latents, patches  # each as large as the sequence
        clean_time, target_time = self.embed_time(torch.zeros_like(t[:1]), sequence.dtype), self.embed_time(t, sequence.dtype)
        time = Modulation(self.project_time(clean_time), self.project_time(target_time), num_clean)
        rotary = self.rotary(condition.shape[1], grid, reference_times, sequence.device, **attention_options)
        for index in range(len(self.blocks)):
            sequence = self.run_block(index, sequence, time, rotary, **attention_options)
        return self.head(sequence[:, num_clean:], target_time, grid)

    def rotary(self, num_condition: int, grid: tuple[int, int, int], reference_times: Tensor | None, device, **attention_options) -> Tensor:
        """-> (B or 1, L, 1, d/2) complex64, see rope.rotary_table. Hosts that let users change the positions override this."""
        return rotary_table(num_condition, grid, self.config.head_dim, self.config.rope_theta, device, reference_times)

    def run_block(self, index: int, sequence: Tensor, time: Modulation, rotary: Tensor, **attention_options) -> Tensor:
        """(B, L, D) -> (B, L, D). Hosts that let users replace blocks override this."""
        return self.blocks[index](sequence, time, rotary, **attention_options)

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) in 0..1 -> (B, D)."""
        return self.time_embedding(sinusoidal_embedding(1000.0 * t.float(), self.config.freq_dim).to(dtype))

    def project_time(self, time: Tensor) -> Tensor:
        """(B, D) -> (B, 6, D)."""
        return self.time_projection(time).unflatten(1, (6, -1))


class Head(nn.Module):
    """Target tokens -> velocity, modulated at the current t."""

    def __init__(self, width: int, channels: int, patch_size: tuple[int, int, int], eps: float, *, operations, device=None, dtype=None):
        super().__init__()
        self.patch_size = patch_size
        self.norm = operations.LayerNorm(width, eps=eps, elementwise_affine=False, device=device, dtype=dtype)
        self.head = operations.Linear(width, math.prod(patch_size) * channels, device=device, dtype=dtype)
        self.modulation = nn.Parameter(torch.randn(1, 2, width, device=device, dtype=parameter_dtype(dtype)) / width**0.5)

    def forward(self, x: Tensor, time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, N_target, D), time (B, D), patch grid -> (B, C, T, Y, X)."""
        shift, scale = (self.modulation.to(time) + time[:, None]).chunk(2, dim=1)
        patches = self.head(torch.addcmul(shift, self.norm(x), 1 + scale))
        (t, y, x), (pt, py, px) = grid, self.patch_size
        return rearrange(patches, "b (t y x) (pt py px c) -> b c (t pt) (y py) (x px)", t=t, y=y, x=x, pt=pt, py=py, px=px)


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim) float32, cosines first, as in Wan."""
    half = dim // 2
    angles = torch.outer(t, torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
