"""Tells which modules of a MODEL have neither been trained nor are changed by a LoRA, so that edits are noise."""

import comfy.model_patcher

from ...mive_core.formats.lora_file import PREFIX
from ...mive_core.formats.untrained import describe_untrained, still_untrained

FIX = "train it, or apply a LoRA that was trained together with them"


def untrained_parts(patcher: comfy.model_patcher.ModelPatcher) -> tuple[str, ...]:
    """A MiVE MODEL -> its untrained modules without those that a patch changes, whichever node added it."""
    changed = [key.removeprefix(PREFIX) for key, patches in patcher.patches.items() if any(strength for strength, *_ in patches)]
    return still_untrained(patcher.model.untrained, changed)


def untrained_warning(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Returns what the user of a MiVE MODEL should know; "" if nothing in it is untrained."""
    parts = untrained_parts(patcher)
    return f"{describe_untrained(parts)}; {FIX}" if parts else ""
