"""MiVE's metadata inside a checkpoint file: in its header or, if one of ComfyUI's save nodes wrote the file, in tensors of bytes.

Save nodes write their own metadata and take only tensors from the model, so each of MiVE's entries is stored as one more tensor;
read_header reads them from there.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...mive_core.config import MiVEConfig
from ...mive_core.errors import UserError
from ...mive_core.formats.checkpoint import read_config
from ...mive_core.formats.safetensors_file import WAN_FAMILY, read_header

PREFIX = "model.diffusion_model."  # what ComfyUI's save nodes put before every key by default


def with_metadata(state: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """Returns a DiT's weights with each entry of the metadata added as one more tensor, of bytes."""
    return {**state, **{key: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for key, text in metadata.items()}}


def config_of(path: Path) -> MiVEConfig:
    """Reads the config of a MiVE DiT file. Raises UserError if the file is damaged, has no config, or is no MiVE DiT."""
    header = read_header(path)
    if f"{PREFIX}context.fuse.weight" in header.shapes:
        raise UserError(
            "the file was saved without MiVE's config",
            where=path,
            got=f"keys that start with {PREFIX}, as an older pack's MODEL was saved",
            fix="load the DiT that it was made from, and save it again with this version",
        )
    if header.family == WAN_FAMILY:
        raise UserError(
            f"this looks like {header.family}",
            where=path,
            got="no context.fuse.weight, no context.projections.0.weight",
            expected="a MiVE DiT",
            fix="the MiVE Init From Wan node makes a MiVE DiT of it, to be trained",
        )
    return read_config(path)
