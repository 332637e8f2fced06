"""A Qwen3-VL that ComfyUI's own CLIP loader has loaded, as a VLM: the same hidden states, and one copy of the weights.

ComfyUI's text encoder reads single images only. Its parts, the vision tower and the decoder, take more, so they are called with the inputs
of transformers' processor here, with videos and the decoder's positions of them. Activations are float32, as in ComfyUI's own encoders.
"""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ...mive_core.errors import UserError
from ...mive_core.formats.vlm_file import IMAGE_TOKEN, MERGE_SIZE, VIDEO_TOKEN, vlm_name
from ...mive_core.types import VLMInputs
from ...mive_core.vlm import VLM, build_processor
from .vlm import QWEN_TOKENIZER, HostedVLM

LOADERS_NAME = "CLIP"  # of a size that is not published


class _StopForward(Exception):
    """Ends a forward pass after the deepest chosen layer."""


class ClipVLM(VLM):
    """ComfyUI's Qwen3-VL (comfy.text_encoders.qwen3vl.Qwen3VL) under the interface of mive_core.vlm.VLM."""

    def __init__(self, model: nn.Module):
        super().__init__(model, build_processor(QWEN_TOKENIZER), vlm_name(model.model.config.hidden_size, Path(LOADERS_NAME)))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.model.model.layers)

    @property
    def width(self) -> int:
        """D_vlm."""
        return self.model.model.config.hidden_size

    def visit(self, inputs: VLMInputs, layers: tuple[int, ...], visit: Callable[[int, Tensor], None]) -> None:
        """One forward pass that calls visit(k, state (1, S, D_vlm)) for each of `layers`, numbered 0..L and taken as in mive_core.vlm."""
        decoder, deepest = self.model.model, max(layers)
        embeds, deepstack, visible = self._embed(inputs)
        if 0 in layers:
            visit(0, embeds)
        if not deepest:
            return

        def seen(k: int, state: Tensor) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            if k in layers:
                visit(k, state)  # DeepStack's features are added to it afterwards, in place
            if k == deepest < self.num_layers:
                raise _StopForward

        hooks = [layer.register_forward_hook(lambda _, args, out, k=k: seen(k, out[0])) for k, layer in enumerate(decoder.layers[:-1], start=1)]
        hooks.append(decoder.norm.register_forward_hook(lambda _, args, out: seen(self.num_layers, out)))
        try:
            decoder(
                None, embeds=embeds, dtype=torch.float32, position_ids=positions(inputs).to(embeds.device), deepstack_embeds=deepstack, visual_pos_masks=visible
            )
        except _StopForward:
            pass
        finally:
            for hook in hooks:
                hook.remove()

    def _embed(self, inputs: VLMInputs) -> tuple[Tensor, list[Tensor], Tensor]:
        """-> embeddings (1, S, D_vlm) with the visual features in place, DeepStack's features by layer, (1, S) where they belong."""
        ids = inputs.input_ids
        embeds = self.model.model.embed_tokens(ids, out_dtype=torch.float32)
        visible = (ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN)
        places = visible.nonzero()[:, 1]
        deepstack: list[Tensor] = []
        for token, pixels, grid in (
            (IMAGE_TOKEN, inputs.pixel_values, inputs.image_grid_thw),
            (VIDEO_TOKEN, inputs.pixel_values_videos, inputs.video_grid_thw),
        ):
            if pixels is None:
                continue
            merged, by_layer = self.model.visual(pixels.float(), grid)
            of_kind = ids[0] == token
            embeds[0, of_kind] = merged.to(embeds)
            deepstack = deepstack or [embeds.new_zeros(len(places), self.width) for _ in by_layer]
            for features, found in zip(deepstack, by_layer):
                features[of_kind[places]] = found.to(features)
        return embeds, deepstack, visible


def positions(inputs: VLMInputs) -> Tensor:
    """(3, S) positions in time, height and width: text counts on, a frame's tokens share their time and begin where the text before them ends."""
    grids = {1: inputs.image_grid_thw.tolist(), 2: [] if inputs.video_grid_thw is None else inputs.video_grid_thw.tolist()}
    frames = {kind: iter([(height // MERGE_SIZE, width // MERGE_SIZE) for num, height, width in rows for _ in range(num)]) for kind, rows in grids.items()}
    start, parts = 0, []
    for kind, run in groupby(inputs.mm_token_type_ids[0].tolist()):
        length = len(list(run))
        if kind == 0:
            parts.append((start + torch.arange(length)).expand(3, -1))
            start += length
            continue
        height, width = next(frames[kind])
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(start + torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1))
        start += max(height, width)
    return torch.cat(parts, dim=1)


def vlm_of_clip(clip: Any) -> HostedVLM:
    """A CLIP -> the Qwen3-VL in it, under the CLIP's own memory management. Raises UserError for other text encoders."""
    encoder = clip.cond_stage_model
    inner = getattr(encoder, getattr(encoder, "clip", ""), None)
    model = getattr(inner, "transformer", None)
    if getattr(getattr(model, "visual", None), "deepstack_merger_list", None) is None:
        raise UserError(
            "this CLIP is no Qwen3-VL with its vision tower",
            got=type(model if model is not None else encoder).__name__,
            expected="a Qwen3-VL file in Load CLIP",
            fix="choose a Qwen3-VL 4B or 8B file; of the types, flux and flux2 drop the vision tower",
        )
    return HostedVLM(ClipVLM(model), clip.patcher, torch.float32)
