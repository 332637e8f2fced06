"""Auxiliary heads (deep supervision) for a DiT trained on drawn clips: early blocks predict place and shape of the edited object, late ones its outline.

(ours) Small heads on the blocks' target tokens learn beside the velocity and are thrown away after training. The velocity alone teaches a
new shape very slowly, because a blob of the right colour in the right place leaves little error.
B batch, T x Y x X patch grid, D model width; lengths in patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..train.objective import EditFeatures, mean_where
from .synthetic import SHAPES

FINE = 2  # parts of a latent cell along each side, that the outline is told in


class AuxiliaryHeads(nn.Module):
    """Reads the target tokens that leave two of a DiT's blocks, counted from 0."""

    def __init__(self, model: MiVEDiT, place_block: int, outline_block: int):
        super().__init__()
        self.config = model.config
        width = self.config.width
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 + len(SHAPES)))  # near, y, x, radius, shape
        self.fine = FINE * self.config.patch_size[-1]  # parts of a patch
        self.outline = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.fine**2))
        self.seen: dict[str, Tensor] = {}
        for name, index in (("place", place_block), ("outline", outline_block)):
            model.blocks[index].register_forward_hook(lambda block, inputs, output, name=name: self.seen.__setitem__(name, output))

    def losses(self, batch: EditFeatures) -> dict[str, Tensor]:
        """Of the tokens of the last forward: aux_near, aux_offset, aux_radius, aux_shape, aux_outline, scalars.

        Every head has a gradient even where no clip of the batch has a thing.
        """
        grid = self.config.patch_grid(*batch.target.shape[2:])
        tokens = {name: value[:, -grid[0] * grid[1] * grid[2] :].float().unflatten(1, grid) for name, value in self.seen.items()}
        self.seen.clear()
        said, drawn = self.place(tokens["place"]), self.outline(tokens["outline"])
        offset, radius = place_in_patches(batch.track, self.config.patch_size, grid)
        has_thing = (batch.shape >= 0).float().view(-1, 1, 1, 1).expand(said.shape[:-1])
        near = has_thing * (offset.abs().amax(dim=-1) < 1.3 * radius + 0.5)
        shape = batch.shape.long().clamp(min=0).view(-1, 1, 1, 1).expand(near.shape)
        return {
            "aux_near": mean_where(has_thing, F.binary_cross_entropy_with_logits(said[..., 0], near, reduction="none")),
            "aux_offset": mean_where(near, (said[..., 1:3] - offset).abs().mean(dim=-1)),
            "aux_radius": mean_where(near, (said[..., 3] - radius).abs()),
            "aux_shape": mean_where(near, F.cross_entropy(said[..., 4:].movedim(-1, 1), shape, reduction="none")),
            "aux_outline": mean_where(near, F.binary_cross_entropy_with_logits(drawn, fine_cover(batch.cover, self.fine), reduction="none").mean(dim=-1)),
        }


def place_in_patches(track: Tensor, patch_size: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(B, T, 3) in latent cells -> from each patch's centre to the thing's, y and x (B, T, Y, X, 2), and its radius (B, T, Y, X)."""
    x, y, radius = (track / patch_size[-1]).unbind(-1)
    rows, columns = (torch.arange(n, device=track.device) + 0.5 for n in grid[1:])
    down = (y[:, :, None] - rows)[..., None].expand(-1, -1, -1, grid[2])
    right = (x[:, :, None] - columns)[:, :, None].expand(-1, -1, grid[1], -1)
    return torch.stack([down, right], dim=-1), radius[:, :, None, None].expand_as(down)


def fine_cover(cover: Tensor, fine: int) -> Tensor:
    """(B, T, fine Y, fine X) -> (B, T, Y, X, fine * fine)."""
    return rearrange(cover, "b t (y fy) (x fx) -> b t y x (fy fx)", fy=fine, fx=fine)
