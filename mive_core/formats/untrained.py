"""Tells whether a MiVE checkpoint is a start for training only: its new parts, which Wan lacks, have not learnt to edit yet."""

from collections.abc import Collection
from pathlib import Path

from .safetensors_file import read_headers, read_tensor

UNTRAINED_KEY = "mive.untrained"  # in a checkpoint's metadata: the parts, separated by commas; training removes it
PATCH_KEY = "patch_embedding.weight"
NEW_PARTS = ("context", "patch_embedding")  # modules of the DiT that Wan lacks, or that are wider than Wan's


def untrained_metadata(parts: tuple[str, ...] = NEW_PARTS) -> dict[str, str]:
    """Untrained modules -> the metadata of their checkpoint, none if all are trained."""
    return {UNTRAINED_KEY: ",".join(parts)} if parts else {}


def untrained_parts(path: Path) -> tuple[str, ...]:
    """MiVE checkpoint (file or sharded index) -> its untrained modules, () for a trained one.

    Files without the mark are older than it: those whose patch embedding ignores the source are untrained, too.
    """
    headers = read_headers(path)
    mark = next((header.metadata[UNTRAINED_KEY] for header in headers if UNTRAINED_KEY in header.metadata), None)
    if mark is not None:
        return tuple(mark.split(","))
    holder = next((header for header in headers if PATCH_KEY in header.shapes), None)
    if holder is None:
        return ()  # an incomplete file, which every loader refuses
    patches = read_tensor(holder, PATCH_KEY)
    source_half = patches[:, patches.shape[1] // 2 :]
    return () if source_half.float().any() else NEW_PARTS


def still_untrained(parts: tuple[str, ...], changed: Collection[str]) -> tuple[str, ...]:
    """Untrained modules and the parameters that LoRAs change -> the modules without a changed weight."""
    weights = [name for name in changed if name.endswith(".weight")]
    return tuple(part for part in parts if not any(name.startswith(f"{part}.") for name in weights))


def describe_untrained(parts: tuple[str, ...]) -> str:
    """Untrained modules, at least one -> a sentence for the user."""
    return f"this DiT is a start for training: its {' and '.join(parts)} have not been trained yet, and until they are, its edits are noise"
