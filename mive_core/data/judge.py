"""Qwen3-VL as a judge: two numbers for an edited clip, by greedy decoding among the tokens that can go on spelling them.

F frames of H x W pixels; S tokens of the prompt, V of the vocabulary.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..prompt import conversation, instruction_text, sample_frames, to_bytes, token_budget
from ..types import Clip, PairedEdit
from ..vlm import load_for_generation

PROMPT = Path(__file__).parents[1] / "assets" / "prompts" / "score.txt"
FPS = 2.0  # frames a second that it sees, as the editing model does
MAX_VIDEO_TOKENS = 4096  # of each of the two clips
MAX_INSTRUCTION_TOKENS = 512
SEPARATOR = ", "
CHARACTERS = "0123456789."


@dataclass(frozen=True)
class Judge:
    """Rates pairs; the same pair always alike."""

    model: nn.Module
    processor: Callable
    prompt: str  # with {source}, {target} and {instruction}

    @classmethod
    def load(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", prompt: Path = PROMPT) -> "Judge":
        """A Hugging Face folder of Qwen3-VL. Raises UserError."""
        return cls(*load_for_generation(folder, dtype=dtype, device=device), prompt.read_text(encoding="utf-8"))

    @torch.inference_mode()
    def rate(self, pair: PairedEdit) -> tuple[float, float]:
        """How well the instruction was followed, and how faithful the rest has stayed: 0.0 to 10.0. Raises UserError."""
        if pair.target is None:
            raise UserError("the pair has no target, so there is nothing to rate")
        inputs, spelling = self.inputs(pair), Spelling.of(self.processor.tokenizer)
        length = inputs["input_ids"].shape[1]
        answer = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=spelling.longest,
            eos_token_id=spelling.end,
            pad_token_id=spelling.end,
            prefix_allowed_tokens_fn=lambda _, ids: spelling.next(ids[length:].tolist()),
        )
        return spelling.numbers(answer[0, length:].tolist())

    def inputs(self, pair: PairedEdit) -> dict[str, Tensor]:
        """What the model reads, by transformers' names; input_ids (1, S)."""
        video, source = self.processor.video_processor, pair.request.source
        words = instruction_text(pair.request.instruction, self.processor.tokenizer, MAX_INSTRUCTION_TOKENS)
        parts = [
            {"type": "video"} if part in ("{source}", "{target}") else {"type": "text", "text": part.replace("{instruction}", words)}
            for part in re.split(r"(\{source\}|\{target\})", self.prompt)
        ]
        clips = [source, Clip(pair.target, source.fps)]
        shown = sample_frames(len(source.frames), source.fps, FPS, video)
        side = video.patch_size * video.merge_size
        encoded = self.processor(
            text=[conversation(parts, self.processor)],
            videos=[to_bytes(clip.frames[shown]) for clip in clips],
            return_tensors="pt",
            videos_kwargs={
                "size": token_budget(video, MAX_VIDEO_TOKENS * side**2 * video.temporal_patch_size),
                "do_sample_frames": False,
                "video_metadata": [{"fps": clip.fps, "total_num_frames": len(clip.frames), "frames_indices": shown} for clip in clips],
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
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:  # transformers 4.57 finds the kinds of token by itself
            inputs["mm_token_type_ids"] = 2 * (ids == self.processor.video_token_id).long()
        return {name: value.to(self.model.device) for name, value in inputs.items()}


@dataclass(frozen=True)
class Spelling:
    """How two numbers with one decimal each, `7.5, 10.0`, are spelt in tokens of single characters."""

    characters: dict[int, str]  # of those tokens
    separator: tuple[int, ...]
    end: int

    @classmethod
    def of(cls, tokenizer: Callable) -> "Spelling":
        """Raises UserError for a tokenizer without single digits."""
        ids = {tokenizer.convert_tokens_to_ids(character): character for character in CHARACTERS}
        if None in ids or tokenizer.unk_token_id in ids or len(ids) < len(CHARACTERS):
            raise UserError("the tokenizer has no tokens of single digits", expected="Qwen3-VL's own")
        return cls(ids, tuple(tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id)

    @property
    def longest(self) -> int:
        """Tokens of an answer, the end included."""
        return 2 * len("10.0") + len(self.separator) + 1

    def next(self, answer: list[int]) -> list[int]:
        """The tokens that may follow, at least one."""
        first, rest = self._number(answer)
        if following := _follows(first):
            return self._ids(following)
        if len(rest) < len(self.separator):
            return [self.separator[len(rest)]]
        second, _ = self._number(rest[len(self.separator) :])
        return self._ids(following) if (following := _follows(second)) else [self.end]

    def numbers(self, answer: list[int]) -> tuple[float, float]:
        """What a whole answer says."""
        first, rest = self._number(answer)
        return float(first), float(self._number(rest[len(self.separator) :])[0])

    def _number(self, answer: list[int]) -> tuple[str, list[int]]:
        """The number that the answer begins with, as far as it goes, and what comes after it."""
        text = ""
        for place, token in enumerate(answer):
            if not _follows(text):
                return text, answer[place:]
            text += self.characters[token]
        return text, []

    def _ids(self, characters: str) -> list[int]:
        return [token for token, character in self.characters.items() if character in characters]


def _follows(number: str) -> str:
    """What may follow the beginning of a number from 0.0 to 10.0 with one decimal; nothing where it is whole."""
    whole, point, decimals = number.partition(".")
    if decimals:
        return ""
    if point:
        return "0" if whole == "10" else "0123456789"
    return {"": "0123456789", "1": "0."}.get(whole, ".")
