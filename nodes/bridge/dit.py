"""The DiT with ComfyUI's forward signature, its attention and its hooks.

B batch, C latent channels, T x Y x X latent grid; R references.
"""

import comfy.patcher_extension
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...mive_core.config import MiVEConfig
from ...mive_core.dit import MiVEDiT
from ...mive_core.dit.blocks import Modulation
from ...mive_core.reference import fix_first_frame, within_window


class HostedDiT(MiVEDiT):
    """The library's DiT with ComfyUI's forward signature. Its keys are unchanged, so LoRAs and offloading find them."""

    def __init__(self, config: MiVEConfig, *, operations, device=None, dtype=None):
        super().__init__(config, operations=operations, attention=optimized_attention, device=device, dtype=dtype)
        self.dtype = dtype

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
        velocity = executor.execute(x, t, source, reference, condition, reference_times, transformer_options=transformer_options)
        return fix_first_frame(velocity, x, t, source, reference) if self.config.fix_first_frame and starts_clip else velocity

    def _velocity(self, x, t, source, reference, condition, reference_times, transformer_options={}):
        transformer_options = {**transformer_options, "total_blocks": len(self.blocks), "block_type": "double"}
        return super().forward(x, source, reference, condition, t, reference_times, transformer_options=transformer_options)

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
