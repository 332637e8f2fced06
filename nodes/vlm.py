"""MiVE Load VLM loads Qwen3-VL; MiVE Layer Select chooses which of its layers guide the edit."""

from dataclasses import dataclass

import comfy.model_management
import torch
from comfy_api.latest import io

from ..mive_core.errors import UserError
from ..mive_core.layers import parse_layers
from .bridge.clip import vlm_of_clip
from .bridge.messages import with_text
from .bridge.paths import find, list_vlms
from .bridge.vlm import HostedVLM

EXPECTED = "a folder of Qwen3-VL with a config.json, or one .safetensors file of it, in models/text_encoders or models/LLM"
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_AND_LAST, EVEN, CUSTOM = "first + last (paper)", "evenly spaced", "custom"
SPECS = {FIRST_AND_LAST: "first+last", "first": "first", "last": "last"}
MAX_LAYERS = 999  # layer specs are checked against this depth while the VLM is not known

VlmType = io.Custom("MIVE_VLM")
LayersType = io.Custom("MIVE_LAYERS")


@dataclass(frozen=True)
class LayerChoice:
    """The value of a MIVE_LAYERS wire: a spec of the layer grammar, or a number of evenly spaced layers."""

    spec: str = SPECS[FIRST_AND_LAST]
    num_even: int = 0

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """Returns the chosen layers of a VLM with `num_layers`, as indices from 0 (the embedding) to num_layers. Raises UserError."""
        if not self.num_even:
            return parse_layers(self.spec, num_layers)
        if self.num_even > num_layers:
            raise UserError("the VLM has fewer layers", where="count", got=self.num_even, expected=f"at most {num_layers}")
        evenly_spaced = torch.linspace(1, num_layers, self.num_even, dtype=torch.float64).round()
        return tuple(int(k) for k in evenly_spaced) if self.num_even > 1 else (num_layers,)


class MiVELoadVLM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELoadVLM",
            display_name="MiVE Load VLM",
            category="MiVE",
            description="Loads the Qwen3-VL that reads the instruction, the reference image and the source video.",
            search_aliases=["qwen3-vl", "qwen", "vision language model", "load vlm", "text encoder"],
            inputs=[
                io.Combo.Input("model", options=list(list_vlms()), tooltip=f"tiny/vlm comes with the pack. Expected: {EXPECTED}."),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip="Data type of weights and arithmetic. default: bf16 if the device is fast at it, else fp32. There is no fp16: it would overflow.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="default: ComfyUI moves the VLM to the graphics card when it is needed. cpu: keeps the card free, but is much slower.",
                ),
            ],
            outputs=[VlmType.Output(display_name="vlm", tooltip="For MiVE Encode and MiVE Layer Select.")],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        return True if model in list_vlms() else f"{model!r} is not there; expected {EXPECTED}"

    @classmethod
    def execute(cls, model: str, dtype: str, device: str) -> io.NodeOutput:
        load_device = torch.device("cpu") if device == "cpu" else comfy.model_management.text_encoder_device()
        return io.NodeOutput(HostedVLM.load(find(list_vlms, model, EXPECTED), DTYPES[dtype], load_device))


class MiVEVLMFromCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEVLMFromCLIP",
            display_name="MiVE VLM From CLIP",
            category="MiVE",
            description="Takes the Qwen3-VL that Load CLIP has loaded, so that it is not loaded twice; quantised files stay quantised.",
            search_aliases=["qwen3-vl", "clip to vlm", "load clip", "text encoder", "share text encoder"],
            inputs=[
                io.Clip.Input("clip", tooltip="From Load CLIP with a Qwen3-VL 4B or 8B file, of any type but flux and flux2, which drop its vision tower.")
            ],
            outputs=[VlmType.Output(display_name="vlm", tooltip="For MiVE Encode and MiVE Layer Select.")],
        )

    @classmethod
    def execute(cls, clip) -> io.NodeOutput:
        return io.NodeOutput(vlm_of_clip(clip))


class MiVELayerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELayerSelect",
            display_name="MiVE Layer Select",
            category="MiVE",
            is_output_node=True,
            description="Chooses the VLM layers whose hidden states guide the edit. Choose as many layers as the DiT was trained with.",
            search_aliases=["hidden states", "vlm layers", "clip skip", "multiscale features"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*SPECS, EVEN, CUSTOM],
                    default=FIRST_AND_LAST,
                    tooltip="first: the output of layer 1. last: the output of the last layer, after the final norm.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="Number of layers for the preset 'evenly spaced', from layer 1 to the last."),
                io.String.Input(
                    "custom",
                    default="1,-1",
                    tooltip="Layers for the preset 'custom': numbers, first, last or slices, such as 1,-1 or 0:36:6. "
                    "0: the input embedding; k: the output of layer k; -1: the last layer.",
                ),
                VlmType.Input("vlm", optional=True, tooltip="If connected, the node shows which of its layers are chosen."),
            ],
            outputs=[
                LayersType.Output(display_name="layers", tooltip="For MiVE Encode."),
                io.String.Output(display_name="resolved", tooltip="The layers by number if a VLM is connected, else the choice as written."),
            ],
        )

    @classmethod
    def validate_inputs(cls, preset: str, custom: str) -> bool | str:
        if preset not in (*SPECS, EVEN, CUSTOM):
            return f"no preset {preset!r}"
        try:
            parse_layers(custom if preset == CUSTOM else SPECS[FIRST_AND_LAST], MAX_LAYERS)
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, preset: str, count: int, custom: str, vlm: HostedVLM | None = None) -> io.NodeOutput:
        choice = LayerChoice(num_even=count) if preset == EVEN else LayerChoice(custom if preset == CUSTOM else SPECS[preset])
        text = f"{count} evenly spaced layers" if choice.num_even else choice.spec
        if vlm is not None:
            text = f"layers {', '.join(map(str, choice.resolve(vlm.vlm.num_layers)))} of {vlm.vlm.num_layers} ({vlm.vlm.name})"
        return io.NodeOutput(choice, text, ui=with_text(text))


NODES = [MiVELoadVLM, MiVEVLMFromCLIP, MiVELayerSelect]
