"""What the model is given of the references, as ComfyUI hands it on: cut where a conditioning area cuts the latent.

B batch, C latent channels, R references, Y x X latent cells.
"""

import comfy.conds


class CONDReference(comfy.conds.CONDRegular):
    """Latents of the references, (B, C, R, Y, X), which an area cuts in rows and columns only."""

    def process_cond(self, batch_size, area=None, **kwargs):
        if area is None:
            return super().process_cond(batch_size)
        _, height, width, _, top, left = area
        return self._copy_with(self.cond[..., top : top + height, left : left + width]).process_cond(batch_size)


class CONDTimes(comfy.conds.CONDRegular):
    """Latent times of the references, (B, R), which count from an area's first frame."""

    def process_cond(self, batch_size, area=None, **kwargs):
        return super().process_cond(batch_size) if area is None else self._copy_with(self.cond - area[3]).process_cond(batch_size)
