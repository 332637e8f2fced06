"""Loads Qwen3-VL, chooses its layers, reads instruction, reference and source into a CONDITIONING."""

from dataclasses import dataclass, replace

import comfy.model_management
import torch
from comfy_api.latest import io, ui

from ..mive_core.config import MiVEConfig
from ..mive_core.errors import UserError
from ..mive_core.layers import parse_layers
from ..mive_core.media.fit import fit_clip, fit_reference
from ..mive_core.types import Clip, EditRequest
from .bridge.conditioning import to_conditioning
from .bridge.messages import logged, show
from .bridge.paths import find, list_vlms
from .bridge.vlm import HostedVLM

EXPECTED = "a folder of Qwen3-VL with a config.json, or one .safetensors file of it, in models/text_encoders or models/LLM"
DTYPES = {"default": None, "bf16": torch.bfloat16, "fp32": torch.float32}
FIRST_AND_LAST, EVEN, CUSTOM = "first + last (paper)", "evenly spaced", "custom"
SPECS = {FIRST_AND_LAST: "first+last", "first": "first", "last": "last"}
DEFAULTS = MiVEConfig()
MAX_LAYERS = 999  # of any VLM: what a spec is held to before the VLM is known

VlmType = io.Custom("MIVE_VLM")
LayersType = io.Custom("MIVE_LAYERS")


@dataclass(frozen=True)
class LayerChoice:
    """What a MIVE_LAYERS wire carries: a spec of the layer grammar, or a number of evenly spaced layers."""

    spec: str = SPECS[FIRST_AND_LAST]
    num_even: int = 0

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a VLM with `num_layers`, counted from 0 (the embedding) to num_layers."""
        if not self.num_even:
            return parse_layers(self.spec, num_layers)
        if self.num_even > num_layers:
            raise UserError("the VLM has fewer layers", where="count", got=self.num_even, expected=f"at most {num_layers}")
        spread = torch.linspace(1, num_layers, self.num_even, dtype=torch.float64).round()
        return tuple(int(k) for k in spread) if self.num_even > 1 else (num_layers,)


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
                    tooltip="The numbers it computes in. default: bf16 where the device is fast at it, else fp32. fp16 would overflow.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="default: ComfyUI moves it to the graphics card for the reading. cpu: keeps the card free, much slower.",
                ),
            ],
            outputs=[VlmType.Output(display_name="vlm", tooltip="For MiVE Encode and MiVE Layer Select.")],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        return True if model in list_vlms() else f"{model!r} is not there; expected {EXPECTED}"

    @classmethod
    def execute(cls, model: str, dtype: str, device: str) -> io.NodeOutput:
        chosen = torch.device("cpu") if device == "cpu" else comfy.model_management.text_encoder_device()
        return io.NodeOutput(HostedVLM.load(find(list_vlms, model, EXPECTED), DTYPES[dtype], chosen))


class MiVELayerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVELayerSelect",
            display_name="MiVE Layer Select",
            category="MiVE",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            description="Chooses the VLM layers whose states guide the edit. Their number must be the one the DiT was trained with.",
            search_aliases=["hidden states", "vlm layers", "clip skip", "multiscale features"],
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=[*SPECS, EVEN, CUSTOM],
                    default=FIRST_AND_LAST,
                    tooltip="first is the output of layer 1, last that of the last layer after the final norm.",
                ),
                io.Int.Input("count", default=4, min=1, max=64, tooltip="How many layers, with the preset 'evenly spaced': from the first to the last."),
                io.String.Input(
                    "custom",
                    default="1,-1",
                    tooltip="With the preset 'custom': numbers, first, last or slices, such as 1,-1 or 0:36:6. "
                    "0 is the input embedding, k the output of layer k, -1 the last.",
                ),
                VlmType.Input("vlm", optional=True, tooltip="Only to show which of its layers the choice means."),
            ],
            outputs=[
                LayersType.Output(display_name="layers", tooltip="For MiVE Encode."),
                io.String.Output(display_name="resolved", tooltip="The layers by number, where a VLM is connected; else the choice as written."),
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
        show(cls, text)
        return io.NodeOutput(choice, text, ui=ui.PreviewText(text))


class MiVEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEEncode",
            display_name="MiVE Encode",
            category="MiVE",
            description="Reads instruction, reference and source in one pass and hands on the states of the chosen layers. "
            "With an empty instruction it makes the negative.",
            search_aliases=["mive prompt", "instruction", "text encode", "conditioning", "edit prompt"],
            inputs=[
                VlmType.Input("vlm", tooltip="From MiVE Load VLM: the VLM that the DiT was trained with."),
                io.Image.Input("source", tooltip="The video to edit, as frames."),
                io.Image.Input("reference", tooltip="One image: the video's first frame, already edited."),
                io.String.Input("instruction", multiline=True, default="", dynamic_prompts=True, tooltip="What to change, in words. Empty for the negative."),
                io.Float.Input("fps", default=24.0, min=0.01, max=1000.0, step=0.01, tooltip="Frames a second of the source video."),
                io.Float.Input(
                    "sampled_fps",
                    default=DEFAULTS.video_fps,
                    min=0.01,
                    max=60.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Frames a second that the VLM sees. Keep what the DiT was trained with: 2.",
                ),
                io.Int.Input(
                    "max_video_tokens",
                    default=DEFAULTS.max_video_tokens,
                    min=16,
                    max=65536,
                    advanced=True,
                    tooltip="The source is scaled to give at most this many tokens. More cost memory and time. "
                    "4096 stands for what the VLM was taught with: 512 for the tiny one, 4096 for the others.",
                ),
                LayersType.Input("layers", optional=True, tooltip="From MiVE Layer Select. Without it: first + last."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For MiVE Reference Latents.")],
        )

    @classmethod
    def execute(
        cls, vlm: HostedVLM, source, reference, instruction: str, fps: float, sampled_fps: float, max_video_tokens: int, layers: LayerChoice = LayerChoice()
    ) -> io.NodeOutput:
        chosen = layers.resolve(vlm.vlm.num_layers)
        asked = {} if max_video_tokens == DEFAULTS.max_video_tokens else {"max_video_tokens": max_video_tokens}
        budget = replace(vlm.taught, video_fps=sampled_fps, **asked)
        with logged():
            clip = fit_clip(Clip(source, fps))
            request = EditRequest(clip, fit_reference(reference, (clip.frames.shape[2], clip.frames.shape[1])), instruction)
            condition = vlm.condition(request, budget, chosen)
        return io.NodeOutput(to_conditioning(condition, vlm.vlm.name))


NODES = [MiVELoadVLM, MiVELayerSelect, MiVEEncode]
