"""The sampling settings of a distilled LoRA, carried by the MODEL that it is applied to."""

from dataclasses import replace
from typing import Any

import comfy.model_patcher
from comfy_extras.nodes_model_advanced import ModelSamplingSD3

from ...mive_core.config import MiVEConfig

KEY = "mive.sampling"  # of a ModelPatcher's attachments


def with_settings(patcher: comfy.model_patcher.ModelPatcher, settings: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    """Returns a clone that is sampled with these values of MiVEConfig's fields steps, shift and cfg."""
    patched = ModelSamplingSD3().patch(patcher, settings["shift"])[0]
    patched.set_attachments(KEY, settings)
    return patched


def with_settings_of(patcher: comfy.model_patcher.ModelPatcher, config: MiVEConfig) -> MiVEConfig:
    """Returns a config with the settings that a MODEL carries; the same without a distilled LoRA."""
    return replace(config, **(patcher.get_attachment(KEY) or {}))


def guidance_warning(patcher: comfy.model_patcher.ModelPatcher, cfg: float) -> str:
    """Returns what the user should know of a guidance scale that the LoRA was not made for; "" if it was."""
    made_for = (patcher.get_attachment(KEY) or {}).get("cfg", cfg)
    return "" if cfg == made_for else f"the LoRA was made for cfg {made_for:g}, and cfg is {cfg:g}: colours will be too strong; set cfg to {made_for:g}"
