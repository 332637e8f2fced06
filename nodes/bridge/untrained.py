"""Tells which modules of a MODEL have neither been trained nor are changed by a LoRA, so that edits are noise."""

import comfy.model_patcher

from ...mive_core.formats.untrained import describe_untrained

FIX = "train it, or apply a LoRA that was trained together with them"


def untrained_parts(patcher: comfy.model_patcher.ModelPatcher) -> tuple[str, ...]:
    """A MiVE MODEL -> its untrained modules without those that a patch changes, whichever node added it."""
    changed = {str(key) for key, patches in patcher.patches.items() if any(strength for strength, *_ in patches)}
    return tuple(part for part in patcher.model.untrained if not any(key.startswith(f"diffusion_model.{part}.") for key in changed))


def untrained_warning(patcher: comfy.model_patcher.ModelPatcher) -> str:
    """Returns what the user of a MiVE MODEL should know; "" if nothing in it is untrained."""
    parts = untrained_parts(patcher)
    return f"{describe_untrained(parts)}; {FIX}" if parts else ""
