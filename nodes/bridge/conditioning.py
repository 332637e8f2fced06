"""How the method's inputs are stored in ComfyUI's CONDITIONING.

The tensor of a CONDITIONING holds the raw hidden states of the chosen layers, (B, S, K * D_vlm), so that stock nodes
can pass it on; its dict holds the layers' indices, small pictures of what was read, the VAE latents of source and references, and the numbers of the
references' frames.
B batch, K chosen layers, S VLM tokens, D_vlm their width.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...mive_core.config import TEMPORAL_FACTOR, MiVEConfig
from ...mive_core.errors import UserError
from ...mive_core.layers import check_layers
from ...mive_core.reference import check_keyframes
from ...mive_core.types import Condition
from .agreement import READ, ReadClip

LAYERS = "mive_layers"  # indices of the K layers
VLM_NAME = "mive_vlm"
GUIDES = {"source": "mive_source_latents", "reference": "mive_reference_latents"}  # raw VAE latents, not yet normalised
REFERENCE_FRAMES = "mive_reference_frames"  # numbers of the pixel frames of reference and keyframes


def to_conditioning(condition: Condition, vlm_name: str, read: ReadClip) -> list:
    """Condition and what it was read from -> CONDITIONING, in float32, because the states hold values that overflow float16."""
    states = rearrange(condition.states.to("cpu", torch.float32), "b k s d -> b s (k d)")
    return [[states, {LAYERS: condition.layers, VLM_NAME: vlm_name, READ: read}]]


def states_of(cond: dict, config: MiVEConfig) -> Tensor:
    """One of ComfyUI's conds -> states (B, K, S, D_vlm). Raises UserError unless the cond is complete and fits the DiT."""
    layers = cond.get(LAYERS)
    if layers is None:
        raise UserError("this conditioning was not made for MiVE", expected="the output of the MiVE Encode node")
    missing = [name for name, key in GUIDES.items() if cond.get(key) is None]
    if missing:
        raise UserError(f"the conditioning has no {' and no '.join(missing)}", fix="put the MiVE Reference Latents node between MiVE Encode and the sampler")
    check_layers(layers, config.resolved_layers)
    states = rearrange(cond["cross_attn"], "b s (k d) -> b k s d", k=len(layers))
    if states.shape[-1] != config.vlm_width:
        raise UserError(
            "the DiT was made for another VLM", got=f"{cond.get(VLM_NAME)} of width {states.shape[-1]}", expected=f"{config.vlm} of width {config.vlm_width}"
        )
    return states


def reference_frames(cond: dict, config: MiVEConfig) -> list[int]:
    """One of ComfyUI's conds -> the number of each reference's frame, the edited first frame before the keyframes. Raises UserError."""
    numbers = list(cond.get(REFERENCE_FRAMES, (0,)))
    num_frames = 1 + TEMPORAL_FACTOR * (cond[GUIDES["source"]].shape[2] - 1)
    check_keyframes(numbers[1:], num_frames, config.keyframes)
    return numbers
