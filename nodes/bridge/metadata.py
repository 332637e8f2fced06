"""What a file says of itself: the config in its metadata or, where ComfyUI's own save nodes wrote it, in a tensor of bytes.

Those nodes write metadata of their own and ask the model only for its tensors, so the config travels among them; read_header
finds it there.
"""

from pathlib import Path

import torch
from torch import Tensor

from ...mive_core.config import METADATA_KEY, MiVEConfig
from ...mive_core.errors import UserError
from ...mive_core.formats.checkpoint import read_config
from ...mive_core.formats.safetensors_file import WAN_FAMILY, read_header

PREFIX = "model.diffusion_model."  # that ComfyUI's save nodes would put before every key


def with_config(state: dict[str, Tensor], config: MiVEConfig) -> dict[str, Tensor]:
    """A DiT's weights -> the same, and the config in the bytes of one more tensor."""
    text = config.to_metadata()[METADATA_KEY].encode()
    return {**state, METADATA_KEY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def config_of(path: Path) -> MiVEConfig:
    """The config of a MiVE DiT's file. Raises UserError where the file is something else, is damaged, or does not say."""
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
