"""Hidden states of K layers -> condition tokens: stage 1's projection, trained with the DiT.

B batch, K chosen layers, S VLM tokens (N_c = S), D_vlm their width, D model width.
"""

import torch
from torch import Tensor, nn


def split_width(width: int, num_layers: int) -> list[int]:
    """Splits D into K nearly equal parts; the paper's K = 2 gives D/2 each (other K are ours)."""
    base, rest = divmod(width, num_layers)
    return [base + (k < rest) for k in range(num_layers)]


class ContextProjection(nn.Module):
    """RMSNorm and Linear to D/K per layer, concatenated on the feature axis and fused by a Linear."""

    def __init__(self, vlm_width: int, width: int, num_layers: int, eps: float, *, operations, device=None, dtype=None):
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.norms = nn.ModuleList(operations.RMSNorm(vlm_width, eps=eps, **factory_kwargs) for _ in range(num_layers))
        self.projections = nn.ModuleList(operations.Linear(vlm_width, part, **factory_kwargs) for part in split_width(width, num_layers))
        self.fuse = operations.Linear(width, width, **factory_kwargs)

    def forward(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K, S, D_vlm) -> (B, N_c, D) in `dtype`. Normalises in float32: single channels are thousands of times larger than the rest."""
        layers = (norm(layer.float()).to(dtype) for norm, layer in zip(self.norms, states.unbind(1)))
        return self.fuse(torch.cat([project(layer) for project, layer in zip(self.projections, layers)], dim=-1))
