"""MiVE Load DiT: loads a MiVE DiT as a MODEL that works with ComfyUI's stock samplers, patches and memory management."""

import torch
from comfy_api.latest import io

from .bridge.load import load_dit
from .bridge.messages import logger, with_text
from .bridge.paths import find, list_dits
from .bridge.untrained import untrained_warning

EXPECTED = "a .safetensors file of a MiVE DiT in models/diffusion_models (.gguf files are not loaded)"
DTYPES = {
    "default": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class MiVELoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELoadDiT",
            display_name="MiVE Load DiT",
            category="MiVE",
            description="Loads the diffusion transformer (DiT) that makes the edit. Its MODEL works with the stock samplers, LoRA loaders and patches.",
            search_aliases=["mive model", "load mive", "video edit model", "unet", "diffusion model"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(list_dits()),
                    tooltip=f"A file from models/diffusion_models. tiny/dit.safetensors comes with the pack. Expected: {EXPECTED}.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Data type in which the weights are stored. default: chosen for the device. fp8 takes half the memory of bf16, "
                    "at some loss of quality; fp8_e4m3fn_fast also multiplies in fp8 on cards that support it.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="A MODEL for MiVE Sampler or any stock sampler.")],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        return True if model in list_dits() else f"{model!r} is not there; expected {EXPECTED}"

    @classmethod
    def execute(cls, model: str, weight_dtype: str) -> io.NodeOutput:
        patcher = load_dit(find(list_dits, model, EXPECTED), DTYPES[weight_dtype], weight_dtype.endswith("_fast"))
        warnings = [untrained_warning(patcher), emulation_warning(patcher)]
        for warning in filter(None, warnings):
            logger.warning("MiVE: %s: %s", model, warning)
        return io.NodeOutput(patcher, ui=with_text("\n".join(filter(None, warnings))))


def emulation_warning(patcher) -> str:
    """Says which formats of the file the device does not multiply; empty if it multiplies all."""
    names = " and ".join(patcher.model.emulated)
    return names and f"this device does not multiply {names}: the weights stay small in memory and are scaled back at each use, which saves no time"


NODES = [MiVELoadDiT]
