"""LoRAs on a MiVE MODEL: which of their keys find a weight, and what is said of those that do not.

MiVE's blocks are Wan's without the cross-attention, so of a Wan LoRA the keys of self-attention and feed-forward fit.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase
from torch import Size, Tensor

from ...mive_core.errors import UserError
from ...mive_core.formats.checkpoint import WAN_TO_DIFFUSERS, rename
from .messages import logger

ROOT = "diffusion_model."  # of the DiT's weights in ComfyUI
# before a layer's name: ComfyUI's and diffusion-pipe's, whole checkpoints', diffusers', PEFT's, DiffSynth's (none)
PREFIXES = (ROOT, f"model.{ROOT}", "transformer.", "base_model.model.", "base_model.model.transformer.", "")
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")  # kohya's and musubi's, Wan Fun's, OneTrainer's, SimpleTuner's
CROSS_ATTENTION = re.compile(r"cross_attn|attn2|norm3|text_embed|img_emb")
OF_BIAS = ("diff_b", "b_norm")  # after the layer's name
FIX = "take a LoRA of Wan 2.1 of this DiT's width, or of MiVE"


@dataclass(frozen=True)
class Fit:
    """How many of a LoRA's keys found a weight, and how many of the others belong to what MiVE leaves out."""

    num_keys: int
    num_fitting: int
    num_cross: int

    def __str__(self) -> str:
        rest = self.num_keys - self.num_fitting
        if not rest:
            return f"all {self.num_keys} keys fit"
        parts = [(self.num_cross, "of the cross-attention, which MiVE does not have"), (rest - self.num_cross, "of other layers or shapes")]
        return f"{self.num_fitting} of {self.num_keys} keys fit, {rest} do not: " + ", ".join(f"{number} {what}" for number, what in parts if number)


def apply_lora(patcher: comfy.model_patcher.ModelPatcher, lora: dict[str, Tensor], strength: float) -> tuple[comfy.model_patcher.ModelPatcher, Fit]:
    """A LoRA under any of the usual names -> a patched clone, and what fitted. Raises UserError where nothing does."""
    lora = comfy.lora_convert.convert_lora(lora)
    targets = targets_of(key for key in patcher.model.state_dict() if key.startswith(ROOT))
    patched = patcher.clone()
    taken = set(patched.add_patches(comfy.lora.load_lora(lora, targets, log_missing=False), strength))

    def fits(key: str) -> bool:
        places = [(targets.get(key[: dot.start()]), key[dot.end() :]) for dot in re.finditer(r"\.", key)]
        return any((f"{target.removesuffix('.weight')}.bias" if part in OF_BIAS else target) in taken for target, part in places if target)

    unfitting = [key for key in lora if not fits(key)]
    return patched, Fit(len(lora), len(lora) - len(unfitting), sum(bool(CROSS_ATTENTION.search(key)) for key in unfitting))


def targets_of(keys: Iterable[str]) -> dict[str, str]:
    """ComfyUI's keys of the weights -> every name that LoRAs have for a layer: the key it changes."""
    targets = {}
    for key in keys:
        wan = key.removeprefix(ROOT)
        (diffusers,) = rename({wan: None}, WAN_TO_DIFFUSERS)
        for name in (wan.removesuffix(".weight"), diffusers.removesuffix(".weight")):
            targets |= {prefix + name: key for prefix in PREFIXES} | {prefix + name.replace(".", "_"): key for prefix in FLAT_PREFIXES}
    return targets


class FittingPatches:
    """Of a LoRA, takes the patches that have their weights' shapes and says how many; nothing fitting is an error, not silence."""

    def add_patches(self, patches: dict, strength_patch: float = 1.0, strength_model: float = 1.0) -> list:
        if any(not isinstance(patch, (WeightAdapterBase, tuple)) for patch in patches.values()):
            return super().add_patches(patches, strength_patch, strength_model)  # of a merge of models, weight by weight
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


class HostedPatcher(FittingPatches, comfy.model_patcher.ModelPatcher):
    """ComfyUI's patcher."""


class HostedDynamicPatcher(FittingPatches, comfy.model_patcher.ModelPatcherDynamic):
    """ComfyUI's patcher that brings weights over one by one."""


def has_shape(patch: WeightAdapterBase | tuple, shape: Size) -> bool:
    """Whether a LoRA's pair of matrices, or its difference, fits a weight; other kinds are left to ComfyUI."""
    if isinstance(patch, LoRAAdapter) and patch.weights[3] is None:
        up, down = patch.weights[:2]
        return up.shape[0] == shape[0] and down[0].numel() == shape[1:].numel()
    return not isinstance(patch, tuple) or patch[0] != "diff" or patch[1][0].shape == shape
