"""Auxiliary heads (deep supervision) for a DiT trained on synthetic clips: early blocks predict place and shape of the edited object, late ones its outline.

(ours) Small heads on the blocks' target tokens are trained together with the velocity and discarded after training. With the velocity loss
alone a new shape is learned very slowly, because a blob of the right colour in the right place has little error left.
B batch, T x Y x X patch grid, D model width; lengths in patches.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..dit import MiVEDiT
from ..train.objective import EditFeatures, masked_mean
from .synthetic import SHAPES

OUTLINE_CELLS = 2  # resolution of the outline: cells per latent cell along each side


class AuxiliaryHeads(nn.Module):
    """Heads on the target tokens that two of a DiT's blocks output, read by forward hooks; blocks are counted from 0."""

    def __init__(self, model: MiVEDiT, place_block: int, outline_block: int):
        super().__init__()
        self.config = model.config
        width = self.config.width
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 + len(SHAPES)))  # near, y, x, radius, shape
        self.cells = OUTLINE_CELLS * self.config.patch_size[-1]  # outline cells per patch along each side
        self.outline = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.cells**2))
        self.outputs: dict[str, Tensor] = {}  # of the two blocks in the last forward pass
        for name, index in (("place", place_block), ("outline", outline_block)):
            model.blocks[index].register_forward_hook(lambda block, inputs, output, name=name: self.outputs.__setitem__(name, output))

    def losses(self, batch: EditFeatures) -> dict[str, Tensor]:
        """Returns the scalars aux_near, aux_offset, aux_radius, aux_shape and aux_outline for the tokens of the last forward pass.

        Every head gets a gradient even if no clip of the batch has an edited object. The batch must have track, shape and cover.
        """
        assert batch.track is not None and batch.shape is not None and batch.cover is not None
        grid = self.config.patch_grid(*batch.target.shape[2:])
        tokens = {name: value[:, -grid[0] * grid[1] * grid[2] :].float().unflatten(1, grid) for name, value in self.outputs.items()}
        self.outputs.clear()
        place, outline = self.place(tokens["place"]), self.outline(tokens["outline"])
        offset, radius = place_in_patches(batch.track, self.config.patch_size, grid)
        has_object = (batch.shape >= 0).float().view(-1, 1, 1, 1).expand(place.shape[:-1])
        near = has_object * (offset.abs().amax(dim=-1) < 1.3 * radius + 0.5)
        shape = batch.shape.long().clamp(min=0).view(-1, 1, 1, 1).expand(near.shape)
        return {
            "aux_near": masked_mean(has_object, F.binary_cross_entropy_with_logits(place[..., 0], near, reduction="none")),
            "aux_offset": masked_mean(near, (place[..., 1:3] - offset).abs().mean(dim=-1)),
            "aux_radius": masked_mean(near, (place[..., 3] - radius).abs()),
            "aux_shape": masked_mean(near, F.cross_entropy(place[..., 4:].movedim(-1, 1), shape, reduction="none")),
            "aux_outline": masked_mean(
                near, F.binary_cross_entropy_with_logits(outline, patchify_cover(batch.cover, self.cells), reduction="none").mean(dim=-1)
            ),
        }


def place_in_patches(track: Tensor, patch_size: tuple[int, int, int], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Converts tracks (B, T, 3) in latent cells to the offset y, x from each patch's centre to the object's (B, T, Y, X, 2) and the radius (B, T, Y, X)."""
    x, y, radius = (track / patch_size[-1]).unbind(-1)
    rows, columns = (torch.arange(n, device=track.device) + 0.5 for n in grid[1:])
    down = (y[:, :, None] - rows)[..., None].expand(-1, -1, -1, grid[2])
    right = (x[:, :, None] - columns)[:, :, None].expand(-1, -1, grid[1], -1)
    return torch.stack([down, right], dim=-1), radius[:, :, None, None].expand_as(down)


def patchify_cover(cover: Tensor, cells: int) -> Tensor:
    """Groups the coverage by patch: (B, T, cells * Y, cells * X) -> (B, T, Y, X, cells * cells)."""
    return rearrange(cover, "b t (y cy) (x cx) -> b t y x (cy cx)", cy=cells, cx=cells)
