"""Applies LoRAs to a MiVE MODEL and reports which of their keys fit.

MiVE's blocks are Wan's without the cross-attention, so the self-attention and feed-forward keys of a Wan LoRA fit.
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
from ...mive_core.formats.checkpoint import WAN_TO_DIFFUSERS, rename_keys
from ...mive_core.formats.lora_file import FLAT_PREFIXES, PREFIXES
from ...mive_core.formats.lora_file import PREFIX as ROOT
from ...mive_core.formats.untrained import untrained_metadata
from .messages import logger
from .metadata import with_metadata
from .untrained import untrained_parts

CROSS_ATTENTION = re.compile(r"cross_attn|attn2|norm3|text_embed|img_emb")
BIAS_SUFFIXES = ("diff_b", "b_norm")  # follow the layer's name
FIX = "take a LoRA of Wan 2.1 of this DiT's width, or of MiVE"


@dataclass(frozen=True)
class Fit:
    """How many of a LoRA's keys fit, and how many of the others belong to the cross-attention, which MiVE does not have."""

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
    """Applies a LoRA in any of the usual key formats -> a patched clone and the Fit. Raises UserError if no key fits."""
    lora = comfy.lora_convert.convert_lora(lora)
    targets = lora_key_map(key for key in patcher.model.state_dict() if key.startswith(ROOT))
    patched = patcher.clone()
    applied = set(patched.add_patches(comfy.lora.load_lora(lora, targets, log_missing=False), strength))

    def fits(key: str) -> bool:
        candidates = [(targets.get(key[: dot.start()]), key[dot.end() :]) for dot in re.finditer(r"\.", key)]
        return any((f"{target.removesuffix('.weight')}.bias" if suffix in BIAS_SUFFIXES else target) in applied for target, suffix in candidates if target)

    unfitting = [key for key in lora if not fits(key)]
    return patched, Fit(len(lora), len(lora) - len(unfitting), sum(bool(CROSS_ATTENTION.search(key)) for key in unfitting))


def lora_key_map(keys: Iterable[str]) -> dict[str, str]:
    """ComfyUI's weight keys -> a map from every layer name that LoRAs use to the weight key it changes."""
    targets: dict[str, str] = {}
    for key in keys:
        wan = key.removeprefix(ROOT)
        (diffusers,) = rename_keys({wan: None}, WAN_TO_DIFFUSERS)
        for name in (wan.removesuffix(".weight"), diffusers.removesuffix(".weight")):
            targets |= {prefix + name: key for prefix in PREFIXES} | {prefix + name.replace(".", "_"): key for prefix in FLAT_PREFIXES}
    return targets


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
