"""MiVE Encode: instruction, reference image and source video -> a CONDITIONING of VLM hidden states."""

from dataclasses import replace

from comfy_api.latest import io

from ..mive_core.config import MiVEConfig
from ..mive_core.layers import check_layers, warn_of_layers
from ..mive_core.media.fit import SAME_SHAPE, fit_clip, fit_reference
from ..mive_core.pipeline import check_vlm
from ..mive_core.types import Clip, EditRequest
from .bridge.agreement import ReadClip, check_order
from .bridge.conditioning import to_conditioning
from .bridge.messages import log_warnings, with_text
from .bridge.model import config_of
from .bridge.vlm import HostedVLM
from .vlm import LayerChoice, LayersType, VlmType

DEFAULTS = MiVEConfig()


class MiVEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVEEncode",
            display_name="MiVE Encode",
            category="MiVE",
            description="The VLM reads instruction, reference and source in one pass; the hidden states of the chosen layers become the conditioning. "
            "With an empty instruction this is the negative conditioning.",
            search_aliases=["mive prompt", "instruction", "text encode", "conditioning", "edit prompt"],
            inputs=[
                VlmType.Input("vlm", tooltip="From MiVE Load VLM: the VLM that the DiT was trained with."),
                io.Image.Input("source", tooltip="The video to edit, as frames."),
                io.Image.Input("reference", tooltip="One image: the video's first frame, already edited."),
                io.String.Input(
                    "instruction", multiline=True, default="", dynamic_prompts=True, tooltip="What to change, in words. Empty for the negative conditioning."
                ),
                io.Float.Input("fps", default=24.0, min=0.01, max=1000.0, step=0.01, tooltip="Frame rate of the source video, in frames per second."),
                io.Float.Input(
                    "sampled_fps",
                    default=DEFAULTS.video_fps,
                    min=0.01,
                    max=60.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Frames per second that the VLM sees. Keep the rate the DiT was trained with: 2.",
                ),
                io.Int.Input(
                    "max_video_tokens",
                    default=DEFAULTS.max_video_tokens,
                    min=16,
                    max=65536,
                    advanced=True,
                    tooltip="The source is scaled down to give the VLM at most this many tokens. More tokens cost memory and time. "
                    "The default, 4096, means the number used in training: 512 for the tiny VLM, 4096 for the others.",
                ),
                LayersType.Input("layers", optional=True, tooltip="From MiVE Layer Select. If not connected: those of model, else first + last."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Straight from MiVE Load DiT. If connected, its own layers and token budgets are used, "
                    "and whether VLM and layers fit is checked before the VLM runs.",
                ),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For MiVE Reference Latents.")],
        )

    @classmethod
    def execute(
        cls,
        vlm: HostedVLM,
        source,
        reference,
        instruction: str,
        fps: float,
        sampled_fps: float,
        max_video_tokens: int,
        layers: LayerChoice | None = None,
        model=None,
    ) -> io.NodeOutput:
        check_order(source, reference)
        with log_warnings() as warned:
            config = vlm.default_config if model is None else config_of(model)
            layer_indices = chosen_layers(vlm, layers, None if model is None else config)
            if sampled_fps != DEFAULTS.video_fps:
                config = replace(config, video_fps=sampled_fps)
            if max_video_tokens != DEFAULTS.max_video_tokens:
                config = replace(config, max_video_tokens=max_video_tokens)
            clip = fit_clip(Clip(source, fps), max_stretch=SAME_SHAPE)
            request = EditRequest(clip, fit_reference(reference, (clip.frames.shape[2], clip.frames.shape[1]), max_stretch=SAME_SHAPE), instruction)
            condition = vlm.condition(request, config, layer_indices)
        return io.NodeOutput(to_conditioning(condition, vlm.vlm.name, ReadClip.of(request)), ui=with_text("\n".join(warned)))


def chosen_layers(vlm: HostedVLM, layers: LayerChoice | None, config: MiVEConfig | None) -> tuple[int, ...]:
    """The layers to read, numbered from 0 to the VLM's depth. Raises UserError for a VLM or layers that the DiT of `config` was not made for."""
    if config is None:
        return (layers or LayerChoice()).resolve(vlm.vlm.num_layers)
    check_vlm(vlm.vlm, config, "vlm")
    if layers is None:
        return config.resolved_layers
    indices = layers.resolve(vlm.vlm.num_layers)
    check_layers(indices, config.resolved_layers, "layers")
    warn_of_layers(indices, config.resolved_layers)
    return indices


NODES = [MiVEEncode]
