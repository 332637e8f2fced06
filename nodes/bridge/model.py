"""MiVE as a ComfyUI model: ComfyUI samples, patches and offloads it, and runs it in context windows, like its own models.

B batch, C latent channels, T x Y x X latent grid; R references, K chosen layers, S = N_c condition tokens, D_vlm their width, D model width.
"""

import comfy.conds
import comfy.context_windows
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
from torch import Tensor

from ...mive_core.config import METADATA_KEY, MiVEConfig
from ...mive_core.cost.flops import Layout
from ...mive_core.cost.memory import activation_bytes
from ...mive_core.errors import UserError
from ...mive_core.reference import latent_times
from .conditioning import GUIDES, reference_frames, states_of
from .conds import CONDReference, CONDTimes
from .distilled import with_settings_of
from .dit import HostedDiT
from .metadata import with_metadata

SLACK = 1.25  # factor for the attention kernel's workspace, a layer's weights in transfer, and memory that the allocator leaves unused


class MiVEModel(comfy.model_base.BaseModel):
    """Flow matching over the target latents, conditioned on source latents, reference latents and condition tokens."""

    def __init__(self, model_config, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostedDiT)
        self.config: MiVEConfig = model_config.unet_config["config"]
        self.checkpoint_name = "the MODEL"  # for messages
        self.untrained: tuple[str, ...] = ()  # modules that the checkpoint says have not been trained

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        """ComfyUI's timestep -> t = sigma in 0..1, for any multiplier set by a sampling patch; Flux's patch has none."""
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds_shapes(self, **cond) -> dict[str, list[int]]:
        """Returns shapes of tokens and references. ComfyUI calls this before it loads weights, so bad conditioning raises UserError here."""
        states = states_of(cond, self.config)
        reference_frames(cond, self.config)
        return {"condition": [states.shape[0], states.shape[2], self.config.width], "reference": list(cond[GUIDES["reference"]].shape)}

    def extra_conds(self, **cond) -> dict[str, comfy.conds.CONDRegular]:
        """Called once per sampling: normalises the latents of source and references, projects the raw states to condition tokens."""
        noise, device = cond["noise"], cond["device"]
        guides = {name: self.process_latent_in(cond[key].to(device, torch.float32)) for name, key in GUIDES.items()}
        check_shapes(noise, guides["source"], guides["reference"])
        condition = self.diffusion_model.context(states_of(cond, self.config).to(device), self.get_dtype_inference())
        times = latent_times(torch.tensor([reference_frames(cond, self.config)], device=device))
        return {
            "source": comfy.conds.CONDNoiseShape(guides["source"]),
            "reference": CONDReference(guides["reference"]),
            "reference_times": CONDTimes(times),
            "condition": comfy.conds.CONDRegular(condition),
        }

    def process_latent_out(self, latent: Tensor) -> Tensor:
        """Called at the end of every sampler. Raises UserError if the latents are not finite, which would decode to a black video."""
        if not latent.isfinite().all():
            raise UserError("the latents are no longer finite", where="sampling", fix="lower cfg, or load the DiT in bf16 or fp32")
        return super().process_latent_out(latent)

    def resize_cond_for_context_window(self, cond_key, cond_value, window, x_in, device, retain_index_list=[]):
        """Cuts the source latents to the window and moves the references' times; the rest is the same for every window."""
        if cond_key == "source":
            return cond_value._copy_with(window.get_tensor(cond_value.cond, device, dim=window.dim, retain_index_list=retain_index_list))
        if cond_key == "reference_times":
            anchor = getattr(window, "causal_anchor_index", None)  # a frame before the window that ComfyUI puts in front of it
            return cond_value._copy_with(cond_value.cond.to(device) - (window.index_list[0] if anchor is None else anchor))
        if cond_key in ("reference", "condition"):
            return cond_value._copy_with(cond_value.cond.to(device))
        return super().resize_cond_for_context_window(cond_key, cond_value, window, x_in, device, retain_index_list)

    def memory_required(self, input_shape, cond_shapes={}) -> float:
        """Estimates the bytes of a forward over the whole sequence (condition, reference and target tokens), times SLACK."""
        num_condition = max((shape[1] for shape in cond_shapes.get("condition", [])), default=0)
        num_references = max((shape[2] for shape in cond_shapes.get("reference", [])), default=1)
        num_tokens = Layout(num_condition, self.config.patch_grid(*input_shape[2:]), num_references).num_tokens
        return SLACK * activation_bytes(self.config, num_tokens, self.get_dtype_inference().itemsize, input_shape[0])


class DiTConfig(dict):
    """The arguments of HostedDiT. Patches for U-Nets look here for a U-Net's: UserError."""

    def __missing__(self, key):
        raise UserError("this patch was made for a U-Net", where="the MODEL's config", got=f"no {key}", fix="it does not fit MiVE, which is a DiT")


class MiVESupport(comfy.supported_models_base.BASE):
    """The model config that ComfyUI reads before it builds the model."""

    unet_extra_config: dict = {}
    latent_format = comfy.latent_formats.Wan21
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, config: MiVEConfig):
        super().__init__({"config": config})
        self.unet_config: dict = DiTConfig(config=config)
        self.sampling_settings["shift"] = config.shift

    def get_model(self, state_dict, prefix="", device=None) -> MiVEModel:
        return MiVEModel(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns what ComfyUI's save nodes write: the keys of every MiVE file, and the config as a tensor."""
        return with_metadata(state_dict, {METADATA_KEY: self.unet_config["config"].to_metadata()[METADATA_KEY]})


def config_of(patcher) -> MiVEConfig:
    """A MODEL -> the config of its checkpoint, with the sampling settings of a distilled LoRA. Raises UserError for other models than MiVE's."""
    if not isinstance(patcher.model, MiVEModel):
        raise UserError("this MODEL is not MiVE's", where="model", got=type(patcher.model).__name__, expected="the output of MiVE Load DiT")
    return with_settings_of(patcher, patcher.model.config)


def check_shapes(noise: Tensor, source: Tensor, reference: Tensor) -> None:
    """Raises UserError unless the latents of source and reference match the size of the latent to sample, (B, C, T, Y, X)."""
    if noise.ndim != 5:
        raise UserError(
            "this is the latent of an image",
            where="latent",
            got=f"shape {tuple(noise.shape)}",
            expected="(batch, channels, frames, rows, columns)",
            fix="take the LATENT of the MiVE Reference Latents node that made the conditioning",
        )
    _frames, height, width = noise.shape[2:]
    if source.shape[2:] != noise.shape[2:]:
        raise UserError(
            "the source and the latent differ",
            got=f"source latents of {_format_grid(source)}, a latent of {_format_grid(noise)}",
            expected="the same",
            fix="take the LATENT of the MiVE Reference Latents node that made the conditioning",
        )
    if reference.shape[3:] != (height, width):
        raise UserError(
            "the reference and the latent differ",
            got=f"reference latents of {_format_grid(reference)}",
            expected=f"{reference.shape[2]} x {height} x {width} (frames x rows x columns)",
        )
    if height % 2 or width % 2:
        raise UserError("the latent's sides are odd", got=_format_grid(noise), fix="choose sides in pixels that are multiples of 16")


def _format_grid(latents: Tensor) -> str:
    return " x ".join(str(side) for side in latents.shape[2:]) + " (frames x rows x columns)"
