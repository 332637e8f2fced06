"""Applies LoRAs to a MiVE MODEL and reports which of their keys fit.

MiVE's blocks are Wan's without the cross-attention, so the self-attention and feed-forward keys of a Wan LoRA fit.
"""

import logging
import re

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Size, Tensor

from ...mive_core.errors import UserError
from ...mive_core.formats.lora_file import PREFIX as ROOT
from ...mive_core.formats.lora_file import lora_key_map
from ...mive_core.formats.lora_fit import FIX, Fit
from ...mive_core.formats.untrained import untrained_metadata
from .messages import logger
from .metadata import with_metadata
from .untrained import untrained_parts

BIAS_SUFFIXES = ("diff_b", "b_norm")  # follow the layer's name


def apply_lora(patcher: comfy.model_patcher.ModelPatcher, lora: dict[str, Tensor], strength: float) -> tuple[comfy.model_patcher.ModelPatcher, Fit]:
    """Applies a LoRA in any of the usual key formats -> a patched clone and the Fit. Raises UserError if no key fits."""
    lora = comfy.lora_convert.convert_lora(lora)
    targets = lora_key_map(key for key in patcher.model.state_dict() if key.startswith(ROOT))
    patched = patcher.clone()
    applied = set(patched.add_patches(comfy.lora.load_lora(lora, targets, log_missing=False), strength))

    def changed_by(key: str) -> str | None:
        candidates = [(targets.get(key[: dot.start()]), key[dot.end() :]) for dot in re.finditer(r"\.", key)]
        weights = (f"{target.removesuffix('.weight')}.bias" if suffix in BIAS_SUFFIXES else target for target, suffix in candidates if target)
        return next((weight.removeprefix(ROOT) for weight in weights if weight in applied), None)

    return patched, Fit.of({key: changed_by(key) for key in lora})


class HostedPatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher that applies only the LoRA patches of the right shape and logs their number. Raises UserError if none fits."""

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        if any(not isinstance(patch, (WeightAdapterBase, tuple)) for patch in patches.values()):
            return super().add_patches(patches, strength_patch, strength_model)  # a merge of models, weight by weight
        weights = {key: weight.shape for key, weight in self.model.state_dict().items() if key.startswith(ROOT)}
        known = {key: patch for key, patch in patches.items() if (key if isinstance(key, str) else key[0]) in weights}
        fitting = {key: patch for key, patch in known.items() if not isinstance(key, str) or has_shape(patch, weights[key])}
        if not patches:
            raise UserError("no key of this LoRA fits the DiT", expected="names of Wan's self-attention and feed-forward layers", fix=FIX)
        if known and not fitting:
            raise UserError(
                "this LoRA was made for a DiT of another size",
                got=f"none of {len(known)} matrices of a fitting shape",
                expected=f"a width of {self.model.config.width}",
                fix=FIX,
            )
        misshapen = f", {len(known) - len(fitting)} have another shape" if len(known) > len(fitting) else ""
        logger.log(
            logging.INFO if fitting and not misshapen else logging.WARNING,
            "MiVE: a LoRA changes %d of the DiT's %d weights%s",
            len(fitting),
            len(weights),
            misshapen,
        )
        return super().add_patches(fitting, strength_patch, strength_model)

    def state_dict_for_saving(self, *args, **kwargs) -> dict[str, Tensor]:
        """Returns what ComfyUI's save nodes write, with the mark of an untrained checkpoint unless a LoRA has what it lacks."""
        return with_metadata(super().state_dict_for_saving(*args, **kwargs), untrained_metadata(untrained_parts(self)))


class HostedDynamicPatcher(HostedPatcher, comfy.model_patcher.ModelPatcherDynamic):
    """The same for ComfyUI's patcher that moves weights to the device one by one."""


def has_shape(patch: WeightAdapterBase | tuple, shape: Size) -> bool:
    """Whether a LoRA's pair of matrices, or its weight difference, fits a weight's shape. True for other kinds, which ComfyUI checks."""
    if isinstance(patch, LoRAAdapter) and patch.weights[3] is None:
        up, down = patch.weights[:2]
        return up.shape[0] == shape[0] and down[0].numel() == shape[1:].numel()
    return not isinstance(patch, tuple) or patch[0] != "diff" or patch[1][0].shape == shape
