"""Tells whether a MiVE checkpoint is a start for training only: its new parts, which Wan lacks, have not learnt to edit yet."""

from pathlib import Path

from .checkpoint import read_config
from .safetensors_file import read_headers, read_tensor

UNTRAINED_KEY = "mive.untrained"  # in a checkpoint's metadata: the parts, separated by commas; training removes it
PATCH_KEY = "patch_embedding.weight"
NEW_PARTS = ("context", "patch_embedding")  # modules of the DiT that Wan lacks, or that are wider than Wan's


def untrained_metadata() -> dict[str, str]:
    """Returns the metadata of a checkpoint whose new parts are untrained."""
    return {UNTRAINED_KEY: ",".join(NEW_PARTS)}


def untrained_parts(path: Path) -> tuple[str, ...]:
    """MiVE checkpoint (file or sharded index) -> its untrained modules, () for a trained one.

    Files without the mark are older than it: those whose patch embedding ignores the source are untrained, too.
    """
    files = {key: file for file in read_headers(path) for key in file.shapes}
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    if UNTRAINED_KEY in metadata:
        return tuple(metadata[UNTRAINED_KEY].split(","))
    source_half = read_tensor(files[PATCH_KEY], PATCH_KEY)[:, read_config(path).latent_channels :]
    return () if source_half.float().any() else NEW_PARTS
