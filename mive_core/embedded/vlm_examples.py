"""What the tiny VLM is taught, batch by batch: paired edits as its processor presents them, and the answers.

B batch, S tokens in the VLM sequence, D_vlm width, V video tokens of a clip, N sampled frames.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import PRESETS
from ..formats.safetensors_file import read_tensors
from ..prompt import build_inputs, chat_text, sample_frames
from ..types import VLMInputs
from .synthetic import PHRASINGS, VOCABULARIES, EditLabels, SyntheticEdit, phrasing

CONFIG = PRESETS["tiny"]
HEADS = "heads.safetensors"
TOKEN_SIDE = 16  # pixels: two patches of eight, merged
PER_TOKEN = 2  # sampled frames in a token
MATCH_WIDTH = 48
UNSAID = ("kind", "place")  # fields that an instruction alone does not settle
HALF = 127.5  # bytes to the processor's -1..1


@dataclass(frozen=True)
class Sentences:
    """Instructions alone, N of them, as a prompt begins with them: up to the marker before the reference."""

    input_ids: Tensor  # (N, S) text padded on the right
    attention_mask: Tensor  # (N, S)
    labels: Tensor  # (N, num_fields) int64


@dataclass(frozen=True)
class VLMBatch:
    """One batch of clips of equal size."""

    inputs: VLMInputs  # text padded on the right
    labels: Tensor  # (B, num_fields) int64, in the order of VOCABULARIES
    edited: Tensor  # (B, V) fraction of the token's pixels that the edit changes
    before: Tensor  # (B, V, 3) the token's mean colour in the source
    after: Tensor  # (B, V, 3) and in the target
    said: Sentences | None = None


@dataclass(frozen=True)
class Example:
    """One clip, kept small: pixels as bytes."""

    inputs: VLMInputs  # pixel values uint8
    labels: Tensor  # (num_fields,) int64
    answer: tuple[Tensor, Tensor, Tensor]  # edited (V,), before (V, 3), after (V, 3)


def example(edit: SyntheticEdit, manner: int, processor) -> Example:
    """A paired edit -> what the VLM reads and what its heads should say."""
    request = replace(edit.pair.request, instruction=as_typed(edit.pair.request.instruction, manner))
    inputs = build_inputs(request, processor, CONFIG)
    inputs = replace(inputs, pixel_values=to_byte(inputs.pixel_values), pixel_values_videos=to_byte(inputs.pixel_values_videos))
    return Example(inputs, torch.tensor(edit.labels.indices()), answer(edit, processor))


def sentences_of(spoken: Sequence[tuple[str, EditLabels]], processor) -> Sentences:
    """Instructions and what they ask for -> a batch."""
    openings = [chat_text(text, processor, CONFIG.max_instruction_tokens).partition(processor.image_token)[0] for text, _ in spoken]
    encoded = processor.tokenizer(openings, padding=True, padding_side="right", return_tensors="pt")
    return Sentences(encoded["input_ids"], encoded["attention_mask"], torch.tensor([labels.indices() for _, labels in spoken]))


def as_typed(instruction: str, manner: int) -> str:
    """The sentence in one of three manners: as it is, with a full stop, or with a capital too."""
    if not instruction or manner == 0:
        return instruction
    return (instruction if manner == 1 else instruction[0].upper() + instruction[1:]) + "."


def to_byte(values: Tensor) -> Tensor:
    """The processor's -1..1 -> 0..255: exact where it did not rescale the picture."""
    return (values * HALF + HALF).round().clamp(0, 2 * HALF).to(torch.uint8)


def batch_of(examples: Sequence[Example], pad_token: int) -> VLMBatch:
    """Examples of one size -> a batch."""
    inputs = pad([one.inputs for one in examples], pad_token)
    inputs = replace(inputs, pixel_values=inputs.pixel_values.float() / HALF - 1, pixel_values_videos=inputs.pixel_values_videos.float() / HALF - 1)
    answers = (torch.stack(column) for column in zip(*(one.answer for one in examples)))
    return VLMBatch(inputs, torch.stack([one.labels for one in examples]), *answers)


def answer(edit: SyntheticEdit, processor) -> tuple[Tensor, Tensor, Tensor]:
    """-> edited (V,), before (V, 3), after (V, 3), in the order of the video tokens."""
    source, pair = edit.pair.request.source, edit.pair
    indices = sample_frames(len(source.frames), source.fps, CONFIG.video_fps, processor.video_processor)
    edited = per_token(pair.mask[indices].float().unsqueeze(-1))
    return edited.squeeze(-1), per_token(source.frames[indices]), per_token(pair.target[indices])


def per_token(frames: Tensor) -> Tensor:
    """(N, H, W, C) -> (V, C): the mean over each token's pixels."""
    num_frames, height, width, channels = frames.shape
    cells = frames.view(num_frames // PER_TOKEN, PER_TOKEN, height // TOKEN_SIDE, TOKEN_SIDE, width // TOKEN_SIDE, TOKEN_SIDE, channels)
    return cells.mean(dim=(1, 3, 5)).reshape(-1, channels)


def pad(inputs: Sequence[VLMInputs], pad_token: int) -> VLMInputs:
    """Prompts of one image and one video each -> one batch, text padded on the right."""
    longest = max(one.input_ids.shape[1] for one in inputs)

    def rows(name: str, value: int) -> Tensor:
        return torch.cat([F.pad(getattr(one, name), (0, longest - getattr(one, name).shape[1]), value=value) for one in inputs])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in inputs])

    return VLMInputs(
        rows("input_ids", pad_token),
        rows("attention_mask", 0),
        rows("mm_token_type_ids", 0),
        joined("pixel_values"),
        joined("image_grid_thw"),
        joined("pixel_values_videos"),
        joined("video_grid_thw"),
    )


class Heads(nn.Module):
    """Linear readers of the states, for teaching and for measuring; the method does not use them."""

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.ModuleDict({field: nn.Linear(width, len(words)) for field, words in VOCABULARIES.items()})
        self.first = nn.Linear(width, 4)  # layer 1, each video token: edited, colour before
        self.last = nn.Linear(width, 4)  # layer L, each video token: edited, colour after
        self.first_norm = nn.LayerNorm(width)
        # layer 1: how much each video token is meant by the instruction
        self.asked, self.offered, self.bias = nn.Linear(width, MATCH_WIDTH), nn.Linear(width, MATCH_WIDTH), nn.Linear(width, 1)

    def hear(self, last: Tensor, said: Sentences) -> dict[str, Tensor]:
        """States (N, S, D_vlm) of layer L -> each field (N, num_words)."""
        state = last[torch.arange(len(last)), said.attention_mask.sum(dim=1) - 1]
        return {field: head(state) for field, head in self.words.items() if field not in UNSAID}

    def forward(self, first: Tensor, last: Tensor, inputs: VLMInputs) -> "Readings":
        """States (B, S, D_vlm) of layers 1 and L -> what they say."""
        batch = torch.arange(len(last))
        kinds = inputs.mm_token_type_ids
        marker = (kinds == 1).int().argmax(dim=1) - 1  # between instruction and reference
        end = last[batch, inputs.attention_mask.sum(dim=1) - 1]
        seen_first, seen_last = (states[kinds == 2].view(len(last), -1, states.shape[-1]) for states in (first, last))
        seen_first, asked = self.first_norm(seen_first), self.first_norm(first[batch, marker])
        meant = (self.offered(seen_first) @ self.asked(asked).unsqueeze(-1)).squeeze(-1) / MATCH_WIDTH**0.5 + self.bias(asked)
        return Readings(
            *({field: head(state) for field, head in self.words.items()} for state in (last[batch, marker], end)),
            meant,
            self.first(seen_first),
            self.last(seen_last),
        )


def load_heads(folder: Path, width: int) -> Heads:
    """The linear readers that were trained with the folder's model."""
    heads = Heads(width)
    heads.load_state_dict({name: value.float() for name, value in read_tensors(folder / HEADS).items()})
    return heads


@dataclass(frozen=True)
class Readings:
    """What the heads read; logits but for the colours."""

    heard: dict[str, Tensor]  # each field (B, num_words), where only the instruction has been read
    words: dict[str, Tensor]  # each field (B, num_words), at the end
    meant: Tensor  # (B, V) layer 1: edited, by the affinity of instruction and video tokens
    first: Tensor  # (B, V, 4) layer 1: edited, colour before
    last: Tensor  # (B, V, 4) layer L: edited, colour after


def losses(readings: Readings, truth: VLMBatch, weights: Sequence[float]) -> dict[str, Tensor]:
    """Scalars: heard, words, meant, where, becomes, first (its where and colour), and their sum under the weights as 'loss'."""
    first, last = readings.first, readings.last
    heard, words = (
        torch.stack([F.cross_entropy(logits[field], truth.labels[:, i]) for i, field in enumerate(VOCABULARIES)]).mean()
        for logits in (readings.heard, readings.words)
    )
    found = {
        "heard": heard,
        "words": words,
        "meant": located(readings.meant, truth.edited),
        "where": located(last[..., 0], truth.edited),
        # what the edit changes counts five times what it keeps
        "becomes": ((last[..., 1:] - truth.after).abs().mean(-1) * (1 + 4 * truth.edited)).mean(),
        "first": F.binary_cross_entropy_with_logits(first[..., 0], truth.edited) + (first[..., 1:] - truth.before).abs().mean(),
    }
    found["loss"] = sum(weight * value for weight, value in zip(weights, list(found.values()), strict=True))
    return found


def misheard(heard: dict[str, Tensor], said: Sentences) -> Tensor:
    """Scalar: what the heads make of instructions alone."""
    fields = list(VOCABULARIES)
    return torch.stack([F.cross_entropy(logits, said.labels[:, fields.index(field)]) for field, logits in heard.items()]).mean()


def located(logits: Tensor, edited: Tensor) -> Tensor:
    """(B, V), (B, V) -> scalar; the overlap counts small objects as much as large ones."""
    return F.binary_cross_entropy_with_logits(logits, edited) + 1 - overlap(logits, edited).mean()


def overlap(logits: Tensor, edited: Tensor) -> Tensor:
    """(B, V), (B, V) -> (B,) intersection over union of the edited fractions of each clip's tokens."""
    guess = logits.sigmoid()
    return torch.minimum(guess, edited).sum(1) / torch.maximum(guess, edited).sum(1)


def phrases() -> Iterator[str]:
    """What the tokenizer learns its words from; no held-out phrasing is among them."""
    yield from ["<|im_start|>user\n", "<|im_start|>assistant\n", "<0.3 seconds>", "<1.7 seconds>"] * 4
    for templates in PHRASINGS.values():
        for template in templates[: -phrasing.NUM_HELD_OUT]:
            yield from (template, as_typed(template, 1), as_typed(template, 2))
    yield from phrasing.OPENINGS
    yield from (f" {closing}" for closing in phrasing.CLOSINGS)
    for words in VOCABULARIES.values():
        yield from (f" {word}" for word in words for _ in range(2))
    for nouns in (phrasing.LOOK_NOUNS, phrasing.TWINS):
        yield from (noun for options in nouns.values() for noun in options)
    for nouns in (phrasing.BACKGROUND_NOUNS, phrasing.WHERE, phrasing.SIDES):
        yield from nouns.values()
