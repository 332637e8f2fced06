"""The DiT with ComfyUI's forward signature, its attention and its hooks.

B batch, C latent channels, T x Y x X latent grid; R references, N_c condition tokens, L tokens, d head width.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import comfy.ldm.common_dit
import comfy.patcher_extension
import torch
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...mive_core.config import MiVEConfig
from ...mive_core.dit import MiVEDiT
from ...mive_core.dit.blocks import Modulation
from ...mive_core.dit.rope import axis_dims, token_positions
from ...mive_core.errors import UserError
from ...mive_core.reference import fix_first_frame, within_window


class MissingPart(UserError, AttributeError):
    """A patch asks the DiT for a part that other models have."""


@dataclass(frozen=True)
class SequenceLayout:
    """What the sequence consists of, for ComfyUI's BlockSparseAttention (0.35 and later): the rows before "video" stay exact, for every query.

    That node reads it where the core's MiniMax-H3 leaves its own.
    """

    KEY: ClassVar[str] = "minimax_h3_layout"
    segments: tuple[tuple[int, int, str], ...]  # first row, row after the last, kind

    @property
    def seq_len(self) -> int:
        return self.segments[-1][1]

    @classmethod
    def of(cls, num_condition: int, num_reference: int, num_target: int) -> "SequenceLayout":
        """The layout of so many rows of each kind, in the order of the sequence."""
        ends = list(accumulate((num_condition, num_reference, num_target)))
        return cls(tuple(zip((0, *ends), ends, ("text", "reference", "video"))))


class HostedDiT(MiVEDiT):
    """The library's DiT with ComfyUI's forward signature. Its keys are unchanged, so LoRAs and offloading find them.

    dim, num_heads, patch_size and rope_embedder are what patches look for in Wan's DiT, in_channels in others'.
    """

    def __init__(self, config: MiVEConfig, *, operations, device=None, dtype=None):
        super().__init__(config, operations=operations, attention=optimized_attention, device=device, dtype=dtype)
        self.dtype = dtype
        self.dim, self.num_heads, self.patch_size, self.in_channels = config.width, config.num_heads, config.patch_size, config.latent_channels
        self.rope_embedder = EmbedND(dim=config.head_dim, theta=config.rope_theta, axes_dim=list(axis_dims(config.head_dim)))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_"):
                raise
            raise MissingPart(f"MiVE's DiT has no {name}", fix="this patch was made for another model and does not fit MiVE") from error

    def forward(  # type: ignore[override]  # ComfyUI's signature
        self,
        x: Tensor,
        t: Tensor,
        context=None,
        control=None,
        transformer_options={},
        *,
        source: Tensor,
        reference: Tensor,
        condition: Tensor,
        reference_times: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """x (B, C, T, Y, X), t (B,) in 0..1 -> velocity (B, C, T, Y, X), through the wrappers added by patches.

        reference_times (B, R) count from the first frame of x, which may be a window of the clip; None: the edited first frame alone.
        """
        if reference_times is None:
            reference_times = t.new_zeros(1, 1)
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._velocity, self, wrappers)
        starts_clip = not reference_times[:, 0].any()
        reference, reference_times = within_window(reference, reference_times, x.shape[2])
        own = x.clone() if wrappers else x  # EasyCache adds to its input, which in float32 is also the sampler's
        velocity = executor.execute(own, t, source, reference, condition, reference_times, transformer_options=transformer_options)
        return fix_first_frame(velocity, x, t, source, reference) if self.config.fix_first_frame and starts_clip else velocity

    def _velocity(self, x, t, source, reference, condition, reference_times, transformer_options={}):
        padded = [comfy.ldm.common_dit.pad_to_patch_size(latents, self.patch_size) for latents in (x, source, reference)]  # an area may have odd sides
        rows = padded[0].shape[3] * padded[0].shape[4] // (self.patch_size[1] * self.patch_size[2])  # in a frame
        layout = SequenceLayout.of(condition.shape[1], reference.shape[2] * rows, x.shape[2] * rows)
        transformer_options = {**transformer_options, "total_blocks": len(self.blocks), "block_type": "double", SequenceLayout.KEY: layout}
        velocity = super().forward(*padded, condition, t, reference_times, transformer_options=transformer_options)
        return velocity[..., : x.shape[3], : x.shape[4]]

    def rotary(self, num_condition, grid, reference_times, device, transformer_options={}) -> Tensor:  # type: ignore[override]
        """-> (B or 1, L, 1, d/2) complex64, with positions scaled and shifted as in ComfyUI's Wan, or with a patch's rope_embedder."""
        options = transformer_options.get("rope_options")
        if options is None and type(self.rope_embedder) is EmbedND:
            return super().rotary(num_condition, grid, reference_times, device)
        axes = zip("tyx", token_positions(grid, reference_times))
        t, y, x = ((options or {}).get(f"scale_{n}", 1.0) * p + (options or {}).get(f"shift_{n}", 0.0) for n, p in axes)
        shape = (*t.shape, *grid[1:])
        ids = torch.stack([t[:, :, None, None].expand(shape), y[:, None].expand(shape), x.expand(shape)], dim=-1).flatten(1, 3)
        matrices = self.rope_embedder(ids.to(device)).movedim(1, 2)  # (B, L - N_c, 1, d/2, 2, 2)
        visual = torch.complex(matrices[..., 0, 0], matrices[..., 1, 0])
        return torch.cat([visual.new_ones(len(visual), num_condition, *visual.shape[2:]), visual], dim=1)

    def run_block(  # type: ignore[override]  # ComfyUI's one attention option
        self, index: int, sequence: Tensor, time: Modulation, rotary: Tensor, transformer_options={}
    ) -> Tensor:
        """Runs a block or its replacement by a patch, with the argument names of Wan's blocks in ComfyUI: "img" is the whole sequence."""
        transformer_options["block_index"] = index
        replace = transformer_options.get("patches_replace", {}).get("dit", {}).get(("double_block", index))
        if replace is None:
            return super().run_block(index, sequence, time, rotary, transformer_options=transformer_options)

        def original(args: dict) -> dict:
            run = super(HostedDiT, self).run_block
            return {"img": run(index, args["img"], args["vec"], args["pe"], transformer_options=args["transformer_options"])}

        arguments = {"img": sequence, "txt": None, "vec": time, "pe": rotary, "transformer_options": transformer_options}
        return replace(arguments, {"original_block": original})["img"]
