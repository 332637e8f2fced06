"""Qwen3-VL as a judge: rates an edited clip with the numbers of a rubric, by greedy decoding constrained to a grammar of ratings.

F frames of H x W pixels; S tokens of the prompt.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..prompt import apply_chat_template, sample_frames, sanitize_instruction, size_limits, to_uint8
from ..types import Clip, PairedEdit
from ..vlm import load_for_generation
from .rating_grammar import RatingGrammar
from .rubrics import SCORE, Rubric

FPS = 2.0  # frame rate of the judge's input, the same as the editing model's
MAX_VIDEO_TOKENS = 4096  # per clip, of two
MAX_REFERENCE_TOKENS = 1024
MAX_INSTRUCTION_TOKENS = 512
MEDIA = {"{source}": "video", "{target}": "video", "{reference}": "image"}


@dataclass(frozen=True)
class Judge:
    """Rates pairs deterministically."""

    model: nn.Module
    processor: Any
    rubric: Rubric = SCORE

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", rubric: Rubric = SCORE) -> "Judge":
        """Loads a Hugging Face folder of Qwen3-VL. Raises UserError."""
        return cls(*load_for_generation(folder, dtype=dtype, device=device), rubric)

    @torch.inference_mode()
    def rate(self, pair: PairedEdit, shuffle_seed: int | None = None) -> tuple[float, ...]:
        """Returns the rubric's numbers; with a seed, after reading the frames in another order. Raises UserError for an answer that is no number."""
        if pair.target is None:
            raise UserError("the pair has no target, so there is nothing to rate")
        inputs, rubric = self.inputs(pair, shuffle_seed), self.rubric
        grammar = RatingGrammar.from_tokenizer(self.processor.tokenizer, rubric.numbers, len(rubric.axes), rubric.capped)
        length = inputs["input_ids"].shape[1]
        answer = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=grammar.max_tokens,
            eos_token_id=grammar.eos_token_id,
            pad_token_id=grammar.eos_token_id,
            prefix_allowed_tokens_fn=lambda _, ids: grammar.allowed_tokens(ids[length:].tolist()),
        )
        return grammar.parse(answer[0, length:].tolist())

    def inputs(self, pair: PairedEdit, shuffle_seed: int | None = None) -> dict[str, Tensor]:
        """Builds the model's inputs by their names in transformers; input_ids (1, S)."""
        video, source = self.processor.video_processor, pair.request.source
        instruction = sanitize_instruction(pair.request.instruction, self.processor.tokenizer, MAX_INSTRUCTION_TOKENS)
        parts = [
            {"type": MEDIA[part]} if part in MEDIA else {"type": "text", "text": part.replace("{instruction}", instruction)}
            for part in re.split(r"(\{source\}|\{target\}|\{reference\})", self.rubric.prompt)
        ]
        clips = [source, Clip(pair.target, source.fps)]
        indices = sample_frames(len(source.frames), source.fps, FPS, video)
        if shuffle_seed is not None:
            indices = shuffle_patches(indices, video.temporal_patch_size, shuffle_seed)
        side = video.patch_size * video.merge_size
        images: dict[str, Any] = {}
        if self.rubric.shows_reference:
            limits = size_limits(self.processor.image_processor, MAX_REFERENCE_TOKENS * side**2)
            images = {"images": [to_uint8(pair.request.reference)], "images_kwargs": {"size": limits}}
        encoded = self.processor(
            **images,
            text=[apply_chat_template(parts, self.processor)],
            videos=[to_uint8(clip.frames[indices]) for clip in clips],
            return_tensors="pt",
            videos_kwargs={
                "size": size_limits(video, MAX_VIDEO_TOKENS * side**2 * video.temporal_patch_size),
                "do_sample_frames": False,
                "video_metadata": [{"fps": clip.fps, "total_num_frames": len(clip.frames), "frames_indices": indices} for clip in clips],
                **({"cap_pixels_per_frame": False} if hasattr(video, "cap_pixels_per_frame") else {}),
            },
        )
        ids = encoded["input_ids"]
        inputs = {
            "input_ids": ids,
            "attention_mask": encoded["attention_mask"],
            "pixel_values_videos": encoded["pixel_values_videos"].to(self.model.dtype),
            "video_grid_thw": encoded["video_grid_thw"],
        }
        if images:
            inputs |= {"pixel_values": encoded["pixel_values"].to(self.model.dtype), "image_grid_thw": encoded["image_grid_thw"]}
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # transformers 4.57 derives the token types itself
            inputs["mm_token_type_ids"] = (ids == self.processor.image_token_id).long() + 2 * (ids == self.processor.video_token_id).long()
        return {name: value.to(self.model.device) for name, value in inputs.items()}


def shuffle_patches(indices: list[int], patch_size: int, seed: int) -> list[int]:
    """The frames in another order, temporal patch by temporal patch, each of which keeps its time stamp; one patch alone stays."""
    patches = [indices[start : start + patch_size] for start in range(0, len(indices), patch_size)]
    generator = torch.Generator().manual_seed(seed)
    order = list(range(len(patches)))
    while len(patches) > 1 and order == sorted(order):
        order = torch.randperm(len(patches), generator=generator).tolist()
    return [index for number in order for index in patches[number]]
