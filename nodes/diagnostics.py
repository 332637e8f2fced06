"""MiVE Layer Diagnostics: where each layer of the VLM sees what an instruction names in an image."""

import json
import math

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..mive_core.errors import UserError
from ..mive_core.evaluation.layer_affinity import affinities_of, describe_affinities, read_image_inputs, report_of
from ..mive_core.evaluation.layer_pictures import draw_heat_map, draw_layers
from ..mive_core.media.fit import check_frames
from .bridge.messages import log_warnings, with_text
from .bridge.vlm import HostedVLM
from .vlm import LayerChoice, LayersType, VlmType

ALL = LayerChoice("1:")


class MiVELayerDiagnostics(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELayerDiagnostics",
            display_name="MiVE Layer Diagnostics",
            category="MiVE",
            is_output_node=True,
            description="Shows, for each layer of the VLM, which regions of an image have most in common with an instruction; "
            "with a mask, measures how much of that falls inside it.",
            search_aliases=["attention map", "heat map", "vlm layers", "affinity", "hidden states"],
            inputs=[
                VlmType.Input("vlm", tooltip="From MiVE Load VLM."),
                io.Image.Input("image", tooltip="One image, such as the edited first frame."),
                io.String.Input("instruction", multiline=True, default="", tooltip="What to look for, in words, such as: purple grass."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the thing is that the instruction names; one mask of the image's size. Without it there are no ratios.",
                ),
                LayersType.Input("layers", optional=True, tooltip="From MiVE Layer Select. If not connected: all layers, from 1 to the last."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The attention mask ratio by layer; without a mask how concentrated each map is."),
                io.Image.Output(display_name="heat_maps", tooltip="One image for each layer: its map over the image, on its own scale."),
                io.Float.Output(display_name="first", tooltip="Attention mask ratio of the first of the layers; NaN without a mask."),
                io.Float.Output(display_name="last", tooltip="Attention mask ratio of the last of the layers; NaN without a mask."),
                io.String.Output(display_name="numbers", tooltip="All numbers, as JSON."),
                io.String.Output(display_name="report", tooltip="The numbers as text."),
            ],
        )

    @classmethod
    def execute(cls, vlm: HostedVLM, image, instruction: str, mask=None, layers: LayerChoice | None = None) -> io.NodeOutput:
        with log_warnings() as warned:
            frame, inside = check_frames(only(image, "image")[None].cpu(), "image")[0], None
            if mask is not None:
                inside = only(mask, "mask").cpu() > 0.5
            chosen = (layers or ALL).resolve(vlm.vlm.num_layers)
            inputs = read_image_inputs(vlm.vlm, frame, instruction, inside)
            affinities = affinities_of(vlm.vlm, vlm.load_for(inputs), chosen, inside)
        plot = torch.from_numpy(np.array(draw_layers(affinities)))[None].float() / 255
        heat_maps = torch.stack([draw_heat_map(frame, row) for row in affinities.layers])
        first, last = (math.nan if row.ratio is None else row.ratio for row in (affinities.layers[0], affinities.layers[-1]))
        report = "\n".join([*warned, describe_affinities(affinities)])
        return io.NodeOutput(plot, heat_maps, first, last, json.dumps(report_of(affinities)), report, ui=with_text(report, ui.PreviewImage(plot, cls=cls)))


def only(batch: Tensor, what: str) -> Tensor:
    """A batch of one -> its only image (H, W, C) or mask (H, W). Raises UserError for several."""
    if batch.ndim < 3 or len(batch) != 1:
        raise UserError(f"one {what} is needed", where=what, got=f"{len(batch)} of them", fix="take one out of the batch, for instance with ImageFromBatch")
    return batch[0]


NODES = [MiVELayerDiagnostics]
