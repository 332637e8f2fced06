"""Qwen3-VL as a judge: rates an edited clip with two numbers, by greedy decoding constrained to a grammar of ratings.

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

PROMPT = Path(__file__).parents[1] / "assets" / "prompts" / "score.txt"
FPS = 2.0  # frame rate of the judge's input, the same as the editing model's
MAX_VIDEO_TOKENS = 4096  # per clip, of two
MAX_INSTRUCTION_TOKENS = 512
SEPARATOR = ", "
CHARACTERS = "0123456789."


@dataclass(frozen=True)
class Judge:
    """Rates pairs deterministically."""

    model: nn.Module
    processor: Any
    prompt: str  # with {source}, {target} and {instruction}

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", prompt: Path = PROMPT) -> "Judge":
        """Loads a Hugging Face folder of Qwen3-VL. Raises UserError."""
        return cls(*load_for_generation(folder, dtype=dtype, device=device), prompt.read_text(encoding="utf-8"))

    @torch.inference_mode()
    def rate(self, pair: PairedEdit) -> tuple[float, float]:
        """Returns the ratings of instruction following and of faithfulness outside the edit, 0.0 to 10.0. Raises UserError."""
        if pair.target is None:
            raise UserError("the pair has no target, so there is nothing to rate")
        inputs, grammar = self.inputs(pair), RatingGrammar.from_tokenizer(self.processor.tokenizer)
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

    def inputs(self, pair: PairedEdit) -> dict[str, Tensor]:
        """Builds the model's inputs by their names in transformers; input_ids (1, S)."""
        video, source = self.processor.video_processor, pair.request.source
        instruction = sanitize_instruction(pair.request.instruction, self.processor.tokenizer, MAX_INSTRUCTION_TOKENS)
        parts = [
            {"type": "video"} if part in ("{source}", "{target}") else {"type": "text", "text": part.replace("{instruction}", instruction)}
            for part in re.split(r"(\{source\}|\{target\})", self.prompt)
        ]
        clips = [source, Clip(pair.target, source.fps)]
        indices = sample_frames(len(source.frames), source.fps, FPS, video)
        side = video.patch_size * video.merge_size
        encoded = self.processor(
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
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # transformers 4.57 derives the token types itself
            inputs["mm_token_type_ids"] = 2 * (ids == self.processor.video_token_id).long()
        return {name: value.to(self.model.device) for name, value in inputs.items()}


@dataclass(frozen=True)
class RatingGrammar:
    """The grammar of an answer: two numbers with one decimal each, such as `7.5, 10.0`, in single-character tokens."""

    characters: dict[int, str]  # token -> character
    separator: tuple[int, ...]  # tokens
    eos_token_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "RatingGrammar":
        """Looks up the token ids. Raises UserError for a tokenizer without single-digit tokens."""
        ids = {tokenizer.convert_tokens_to_ids(character): character for character in CHARACTERS}
        if None in ids or tokenizer.unk_token_id in ids or len(ids) < len(CHARACTERS):
            raise UserError("the tokenizer has no tokens of single digits", expected="Qwen3-VL's own")
        return cls(ids, tuple(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id)

    @property
    def max_tokens(self) -> int:
        """Length of the longest answer, including the end-of-sequence token."""
        return 2 * len("10.0") + len(self.separator) + 1

    def allowed_tokens(self, answer: list[int]) -> list[int]:
        """The tokens that may follow the answer so far, at least one."""
        first, rest = self._split_number(answer)
        if following := _next_characters(first):
            return self._ids(following)
        if len(rest) < len(self.separator):
            return [self.separator[len(rest)]]
        second, _ = self._split_number(rest[len(self.separator) :])
        return self._ids(following) if (following := _next_characters(second)) else [self.eos_token_id]

    def parse(self, answer: list[int]) -> tuple[float, float]:
        """The two numbers of a complete answer."""
        first, rest = self._split_number(answer)
        return float(first), float(self._split_number(rest[len(self.separator) :])[0])

    def _split_number(self, answer: list[int]) -> tuple[str, list[int]]:
        """Splits off the (possibly incomplete) number at the start -> the number, and the remaining tokens."""
        text = ""
        for index, token in enumerate(answer):
            if not _next_characters(text):
                return text, answer[index:]
            text += self.characters[token]
        return text, []

    def _ids(self, characters: str) -> list[int]:
        return [token for token, character in self.characters.items() if character in characters]


def _next_characters(number: str) -> str:
    """The characters that may follow a prefix of a number from 0.0 to 10.0 with one decimal; none if it is complete."""
    whole, point, decimals = number.partition(".")
    if decimals:
        return ""
    if point:
        return "0" if whole == "10" else "0123456789"
    return {"": "0123456789", "1": "0."}.get(whole, ".")
