"""MiVE Init From Wan: converts a Wan checkpoint into a MiVE checkpoint to train from, inside ComfyUI's model folders."""

from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..mive_core.config import VLM_SIZES
from ..mive_core.errors import UserError
from ..mive_core.formats.from_wan import EMBEDDED_VLM, init_from_wan, vlm_fields
from ..mive_core.layers import parse_layers
from .bridge.messages import with_text
from .bridge.paths import find, list_dits, output_path

EXPECTED = "a .safetensors file of a Wan T2V or Fun-Control in models/diffusion_models"


class MiVEInitFromWan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEInitFromWan",
            display_name="MiVE Init From Wan",
            category="MiVE",
            is_output_node=True,
            description="Converts a Wan T2V or Fun-Control checkpoint into a MiVE checkpoint to train from: shared layers are copied, "
            "new ones are initialised. It cannot edit before it is trained.",
            search_aliases=["convert wan", "wan to mive", "initialise", "training start"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(list_dits()),
                    tooltip=f"A Wan2.1-T2V, Wan2.2-T2V-A14B or Wan-Fun-Control checkpoint, 1.3B or 14B, in 16 bits or scaled fp8. Expected: {EXPECTED}.",
                ),
                io.String.Input(
                    "filename",
                    default="mive_init.safetensors",
                    tooltip="Name of the new file in models/diffusion_models. An existing file is never overwritten.",
                ),
                io.Combo.Input(
                    "vlm",
                    options=[*VLM_SIZES, EMBEDDED_VLM],
                    default="8b",
                    tooltip="Size of the Qwen3-VL whose hidden states the new model will read; tiny is the one that comes with the pack.",
                ),
                io.String.Input("layers", default="first+last", tooltip="The VLM layers that the new model will read: first+last, 1,-1, last or 0:36:6."),
            ],
            outputs=[io.String.Output(display_name="filename", tooltip="Name of the new file. MiVE Load DiT lists it after the page is refreshed.")],
        )

    @classmethod
    def validate_inputs(cls, filename: str, layers: str, vlm: str) -> bool | str:
        try:
            destination(filename)
            parse_layers(layers, vlm_fields(vlm)["vlm_num_layers"])
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: str, filename: str, vlm: str, layers: str) -> io.NodeOutput:
        path = destination(filename)
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        config = init_from_wan(find(list_dits, model, EXPECTED), path, layers=layers, vlm=vlm, progress=progress)
        report = f"{filename}: {config.num_blocks} blocks of width {config.width}, reads layers {', '.join(map(str, config.layers))} of {config.vlm}"
        return io.NodeOutput(filename, ui=with_text(report))


def destination(name: str) -> Path:
    """Returns the path in models/diffusion_models for a plain file name. Raises UserError for any other name, and if the file exists."""
    path = output_path("diffusion_models", name, "filename")
    if path.exists():
        raise UserError("the file is there already", where="filename", got=name, fix="choose another name, or delete the file")
    return path


NODES = [MiVEInitFromWan]
