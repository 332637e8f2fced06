"""MiVE Sampler: samples an edit in one node, by calling ModelSamplingSD3 and KSampler."""

import comfy.samplers
from comfy_api.latest import io
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

import nodes

from ..mive_core.flow import schedule
from ..mive_core.layers import warn_of_layers
from ..mive_core.pipeline import check_cfg
from .bridge.conditioning import GUIDES, LAYERS, reference_frames, states_of
from .bridge.distilled import guidance_warning
from .bridge.messages import log_warnings, logger, with_text
from .bridge.model import check_shapes, config_of
from .bridge.stretches import latent_stretches, sample_stretches
from .bridge.untrained import untrained_warning

MAX_SEED = 0xFFFFFFFFFFFFFFFF


def sampling_inputs(advanced: bool = False) -> list:
    """The settings of a sampling; `advanced` hides those that are seldom changed."""
    return [
        io.Int.Input(
            "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True, tooltip="Random seed of the noise. The same seed gives the same video."
        ),
        io.Int.Input("steps", default=0, min=0, max=1000, tooltip="Number of denoising steps. Time grows in proportion. 0: the model's own number."),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="Classifier-free guidance scale: higher values follow the instruction more closely. 1: no guidance, twice as fast.",
        ),
        io.Float.Input(
            "shift",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            advanced=advanced,
            tooltip="Timestep shift: above 1, more of the steps are spent at high noise. 0: the model's own value.",
        ),
        io.Combo.Input(
            "sampler",
            options=comfy.samplers.KSampler.SAMPLERS,
            default="euler",
            advanced=advanced,
            tooltip="The sampling method. The model was tested with euler.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="simple",
            advanced=advanced,
            tooltip="How the noise levels of the steps are spaced. The model was tested with simple.",
        ),
    ]


class MiVESampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MiVESampler",
            display_name="MiVE Sampler",
            category="MiVE",
            description="Generates the edited video from noise, bit for bit as ModelSamplingSD3 and KSampler do. "
            "A video longer than the model knows is made in stretches, one after the other.",
            search_aliases=["ksampler", "sample", "denoise", "video edit"],
            inputs=[
                io.Model.Input("model", tooltip="From MiVE Load DiT, optionally with LoRAs and patches applied."),
                io.Conditioning.Input("positive", tooltip="From MiVE Reference Latents."),
                io.Conditioning.Input("negative", tooltip="From MiVE Reference Latents. Not used when cfg is 1."),
                io.Latent.Input("latent", tooltip="From MiVE Reference Latents."),
                *sampling_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1: start from noise. Less than 1: start from the latent, which must then be an encoded video. 0: return the latent unchanged.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, seed: int, steps: int, cfg: float, shift: float, sampler: str, scheduler: str, denoise: float
    ) -> io.NodeOutput:
        config = config_of(model)
        steps = steps or config.steps
        check_cfg(cfg)
        schedule(steps, shift or 1.0)
        with log_warnings():
            for states, values in (*positive, *negative):
                states_of({**values, "cross_attn": states}, config)
                warn_of_layers(values[LAYERS], config.resolved_layers)
                reference_frames(values, config)
                check_shapes(latent["samples"], *(values[key] for key in GUIDES.values()))
        warnings = [warning for warning in (untrained_warning(model), guidance_warning(model, cfg)) if warning]
        for warning in warnings:
            logger.warning("MiVE: %s", warning)
        if shift:
            model = ModelSamplingSD3().patch(model, shift)[0]

        def sample(positive: list, negative: list, latent: dict) -> dict:
            return nodes.common_ksampler(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise)[0]

        spans = latent_stretches(model, latent["samples"].shape[2], config.edit_frames)
        return io.NodeOutput(sample_stretches(sample, positive, negative, latent, spans), ui=with_text("\n".join(warnings)))


NODES = [MiVESampler]
