"""MiVE Load LoRA: applies a Wan LoRA in any of the usual key formats to a MiVE MODEL and reports how many keys fit."""

from pathlib import Path

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..mive_core.errors import UserError
from ..mive_core.formats.lora_file import sampling_of
from ..mive_core.formats.lora_fit import check_base
from ..mive_core.formats.safetensors_file import read_header
from .bridge.distilled import with_settings
from .bridge.lora import apply_lora
from .bridge.messages import logger, with_text
from .bridge.model import MiVEModel
from .bridge.paths import find
from .bridge.untrained import untrained_warning

EXPECTED = "a .safetensors file of a LoRA in models/loras"


class MiVELoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELoadLoRA",
            display_name="MiVE Load LoRA",
            category="MiVE",
            is_output_node=True,
            description="Applies a LoRA made for Wan 2.1 or MiVE to the DiT and reports how many of its keys fit. The stock LoRA loader works too, "
            "but knows fewer key formats and reports no count.",
            search_aliases=["lora", "wan lora", "few-step", "lightx2v", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="From MiVE Load DiT."),
                io.Combo.Input(
                    "lora_name",
                    options=list(list_loras()),
                    tooltip=f"A LoRA made for a model of the DiT's size, such as Wan 2.1 14B for a 14B DiT. Expected: {EXPECTED}.",
                ),
                io.Float.Input("strength_model", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip="Strength of the LoRA. 0: no effect."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For MiVE Sampler, or for another LoRA loader."),
                io.String.Output(display_name="report", tooltip="How many keys fit, and which layers the others belong to."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        return True if lora_name is None or lora_name in list_loras() else f"{lora_name!r} is not there; expected {EXPECTED}"

    @classmethod
    def execute(cls, model, lora_name: str, strength_model: float) -> io.NodeOutput:
        if not isinstance(model.model, MiVEModel):
            raise UserError("this MODEL is not MiVE's", where="model", got=type(model.model).__name__, expected="the output of MiVE Load DiT")
        path = find(list_loras, lora_name, EXPECTED)
        header = read_header(path)  # raises a clear UserError for a damaged file
        check_base(header.metadata, model.model.config, lora_name, model.model.checkpoint_name)
        patched, fit = apply_lora(model, comfy.utils.load_torch_file(str(path), safe_load=True), strength_model)
        report = f"{lora_name}: {fit}"
        if (sampling := sampling_of(header.metadata)) and strength_model:
            patched = with_settings(patched, sampling)
            settings = "{steps} steps, cfg {cfg:g} and shift {shift:g}".format(**sampling)
            report += f"\nmade for {settings}: MiVE Sampler takes these steps and this shift where its own are 0"
        if fit.num_fitting < fit.num_keys:
            logger.warning("MiVE: %s", report)
        if warning := untrained_warning(patched):
            report += f"\n{warning}"
            logger.warning("MiVE: %s", warning)
        return io.NodeOutput(patched, report, ui=with_text(report))


def list_loras() -> dict[str, Path]:
    """Returns dropdown entry -> path for the .safetensors files in models/loras."""
    names = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
    found = {name: folder_paths.get_full_path("loras", name) for name in names}
    return {name: Path(path) for name, path in found.items() if path is not None}


NODES = [MiVELoadLoRA]
