"""Training batches, heads and losses of the tiny VLM: preprocessed paired edits with their labels and per-token targets.

B batch, S tokens in the VLM sequence, D_vlm width, V video tokens of a clip, N sampled frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import PRESETS
from ..formats.safetensors_file import read_tensors
from ..prompt import build_inputs, build_prompt, sample_frames
from ..types import VLMInputs
from .synthetic import PHRASINGS, VOCABULARIES, EditLabels, SyntheticEdit, phrasing

CONFIG = PRESETS["tiny"]
HEADS = "heads.safetensors"
TOKEN_SIDE = 16  # pixels: two merged patches of eight
FRAMES_PER_TOKEN = 2  # sampled frames per video token
AFFINITY_WIDTH = 48  # width of queries and keys
NOT_IN_INSTRUCTION = ("kind", "place")  # fields that an instruction alone does not determine
HALF = 127.5  # half the range of bytes: scales the processor's -1..1


@dataclass(frozen=True)
class InstructionBatch:
    """N instructions without pictures: the beginning of the prompt, up to the marker before the reference."""

    input_ids: Tensor  # (N, S) padded on the right
    attention_mask: Tensor  # (N, S)
    labels: Tensor  # (N, num_fields) int64


@dataclass(frozen=True)
class VLMBatch:
    """A batch of clips of equal size."""

    inputs: VLMInputs  # text padded on the right
    labels: Tensor  # (B, num_fields) int64, in the order of VOCABULARIES
    edited: Tensor  # (B, V) fraction of each token's pixels that the edit changes
    before: Tensor  # (B, V, 3) each token's mean colour in the source
    after: Tensor  # (B, V, 3) each token's mean colour in the target
    instructions: InstructionBatch | None = None  # additional instructions without pictures


@dataclass(frozen=True)
class Example:
    """One clip with pixels stored as bytes."""

    inputs: VLMInputs  # pixel values uint8
    labels: Tensor  # (num_fields,) int64
    targets: tuple[Tensor, Tensor, Tensor]  # edited (V,), before (V, 3), after (V, 3)


def example(edit: SyntheticEdit, style: int, processor: Any) -> Example:
    """Converts a paired edit to VLM inputs, labels and per-token targets; as_typed explains `style`."""
    request = replace(edit.pair.request, instruction=as_typed(edit.pair.request.instruction, style))
    inputs = build_inputs(request, processor, CONFIG)
    assert inputs.pixel_values_videos is not None
    inputs = replace(inputs, pixel_values=to_byte(inputs.pixel_values), pixel_values_videos=to_byte(inputs.pixel_values_videos))
    return Example(inputs, torch.tensor(edit.labels.indices()), token_targets(edit, processor))


def instruction_batch(labelled: Sequence[tuple[str, EditLabels]], processor: Any) -> InstructionBatch:
    """Tokenizes instructions with their labels into a batch."""
    prompts = [build_prompt(text, processor, CONFIG.max_instruction_tokens).partition(processor.image_token)[0] for text, _ in labelled]
    encoded = processor.tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
    return InstructionBatch(encoded["input_ids"], encoded["attention_mask"], torch.tensor([labels.indices() for _, labels in labelled]))


def as_typed(instruction: str, style: int) -> str:
    """Punctuates an instruction in one of three styles: 0 unchanged, 1 with a full stop, 2 also with a capital letter."""
    if not instruction or style == 0:
        return instruction
    return (instruction if style == 1 else instruction[0].upper() + instruction[1:]) + "."


def to_byte(values: Tensor) -> Tensor:
    """Quantises the processor's -1..1 to 0..255; exact if the processor did not rescale the picture."""
    return (values * HALF + HALF).round().clamp(0, 2 * HALF).to(torch.uint8)


def batch_of(examples: Sequence[Example], pad_token: int) -> VLMBatch:
    """Collates examples of one size."""
    inputs = pad([one.inputs for one in examples], pad_token)
    assert inputs.pixel_values_videos is not None
    inputs = replace(inputs, pixel_values=inputs.pixel_values.float() / HALF - 1, pixel_values_videos=inputs.pixel_values_videos.float() / HALF - 1)
    targets = (torch.stack(column) for column in zip(*(one.targets for one in examples)))
    return VLMBatch(inputs, torch.stack([one.labels for one in examples]), *targets)


def token_targets(edit: SyntheticEdit, processor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Returns edited (V,), before (V, 3) and after (V, 3) in the order of the video tokens; see VLMBatch."""
    source, target, mask = edit.pair.request.source, edit.pair.target, edit.pair.mask
    assert target is not None and mask is not None  # every synthetic edit has both
    indices = sample_frames(len(source.frames), source.fps, CONFIG.video_fps, processor.video_processor)
    edited = per_token(mask[indices].float().unsqueeze(-1))
    return edited.squeeze(-1), per_token(source.frames[indices]), per_token(target[indices])


def per_token(frames: Tensor) -> Tensor:
    """Averages over each token's pixels: (N, H, W, C) -> (V, C)."""
    num_frames, height, width, channels = frames.shape
    cells = frames.view(num_frames // FRAMES_PER_TOKEN, FRAMES_PER_TOKEN, height // TOKEN_SIDE, TOKEN_SIDE, width // TOKEN_SIDE, TOKEN_SIDE, channels)
    return cells.mean(dim=(1, 3, 5)).reshape(-1, channels)


def pad(inputs: Sequence[VLMInputs], pad_token: int) -> VLMInputs:
    """Batches prompts with one image each, and one video each or none at all, padding the text on the right."""
    longest = max(one.input_ids.shape[1] for one in inputs)

    def padded(name: str, value: int) -> Tensor:
        return torch.cat([F.pad(getattr(one, name), (0, longest - getattr(one, name).shape[1]), value=value) for one in inputs])

    def joined(name: str) -> Tensor | None:
        return None if getattr(inputs[0], name) is None else torch.cat([getattr(one, name) for one in inputs])

    return VLMInputs(
        padded("input_ids", pad_token),
        padded("attention_mask", 0),
        padded("mm_token_type_ids", 0),
        joined("pixel_values"),
        joined("image_grid_thw"),
        joined("pixel_values_videos"),
        joined("video_grid_thw"),
    )


class Heads(nn.Module):
    """Linear probes of the hidden states, for training and evaluating the VLM only; the editing method does not use them.

    Attribute names are keys of heads.safetensors.
    """

    def __init__(self, width: int):
        super().__init__()
        self.words = nn.ModuleDict({field: nn.Linear(width, len(words)) for field, words in VOCABULARIES.items()})
        self.first = nn.Linear(width, 4)  # layer 1, per video token: edited, colour before
        self.last = nn.Linear(width, 4)  # layer L, per video token: edited, colour after
        self.first_norm = nn.LayerNorm(width)
        # layer 1, affinity of instruction and video tokens: projections of the query (instruction) and of the keys (video tokens), bias
        self.asked, self.offered, self.bias = nn.Linear(width, AFFINITY_WIDTH), nn.Linear(width, AFFINITY_WIDTH), nn.Linear(width, 1)

    def classify_instructions(self, last: Tensor, instructions: InstructionBatch) -> dict[str, Tensor]:
        """Classifies instructions without pictures: states (N, S, D_vlm) of layer L -> logits (N, num_words) per field."""
        state = last[torch.arange(len(last)), instructions.attention_mask.sum(dim=1) - 1]
        return {field: head(state) for field, head in self.words.items() if field not in NOT_IN_INSTRUCTION}

    def forward(self, first: Tensor, last: Tensor, inputs: VLMInputs) -> "HeadOutputs":
        """Applies all heads to the states (B, S, D_vlm) of layers 1 and L."""
        batch = torch.arange(len(last))
        types = inputs.mm_token_type_ids
        marker = (types == 1).int().argmax(dim=1) - 1  # token between instruction and reference
        end = last[batch, inputs.attention_mask.sum(dim=1) - 1]
        video_first, video_last = (states[types == 2].view(len(last), -1, states.shape[-1]) for states in (first, last))
        video_first, instruction = self.first_norm(video_first), self.first_norm(first[batch, marker])
        keys, query = self.offered(video_first), self.asked(instruction)
        return HeadOutputs(
            {field: head(last[batch, marker]) for field, head in self.words.items()},
            {field: head(end) for field, head in self.words.items()},
            (keys @ query.unsqueeze(-1)).squeeze(-1) / AFFINITY_WIDTH**0.5 + self.bias(instruction),
            self.first(video_first),
            self.last(video_last),
        )


def load_heads(folder: Path, width: int) -> Heads:
    """Loads the heads that were trained with the folder's model."""
    heads = Heads(width)
    heads.load_state_dict({name: value.float() for name, value in read_tensors(folder / HEADS).items()})
    return heads


@dataclass(frozen=True)
class HeadOutputs:
    """Outputs of all heads: logits, except for the colours."""

    instruction_fields: dict[str, Tensor]  # (B, num_words) per field, at the end of the instruction, before reference and video
    fields: dict[str, Tensor]  # (B, num_words) per field, at the end of the prompt
    affinity: Tensor  # (B, V) layer 1: edited, from the affinity of instruction and video tokens
    first: Tensor  # (B, V, 4) layer 1: edited, colour before
    last: Tensor  # (B, V, 4) layer L: edited, colour after


def losses(outputs: HeadOutputs, batch: VLMBatch, weights: Sequence[float]) -> dict[str, Tensor]:
    """Returns the losses as scalars, and their weighted sum as 'loss'.

    heard: fields at the end of the instruction; words: fields at the end of the prompt; meant: location by affinity, layer 1;
    where: location, layer L; becomes: colour after the edit, layer L; first: location and colour before the edit, layer 1.
    """
    first, last = outputs.first, outputs.last
    heard, words = (
        torch.stack([F.cross_entropy(logits[field], batch.labels[:, i]) for i, field in enumerate(VOCABULARIES)]).mean()
        for logits in (outputs.instruction_fields, outputs.fields)
    )
    values = {
        "heard": heard,
        "words": words,
        "meant": localisation_loss(outputs.affinity, batch.edited),
        "where": localisation_loss(last[..., 0], batch.edited),
        # edited tokens have five times the weight of others
        "becomes": ((last[..., 1:] - batch.after).abs().mean(-1) * (1 + 4 * batch.edited)).mean(),
        "first": F.binary_cross_entropy_with_logits(first[..., 0], batch.edited) + (first[..., 1:] - batch.before).abs().mean(),
    }
    values["loss"] = sum(weight * value for weight, value in zip(weights, list(values.values()), strict=True))
    return values


def instruction_loss(logits: dict[str, Tensor], instructions: InstructionBatch) -> Tensor:
    """Returns the cross entropy of the fields predicted from instructions alone, a scalar."""
    fields = list(VOCABULARIES)
    return torch.stack([F.cross_entropy(value, instructions.labels[:, fields.index(field)]) for field, value in logits.items()]).mean()


def localisation_loss(logits: Tensor, edited: Tensor) -> Tensor:
    """Returns BCE plus soft IoU loss: (B, V), (B, V) -> scalar. The IoU weighs small and large objects equally."""
    return F.binary_cross_entropy_with_logits(logits, edited) + 1 - soft_iou(logits, edited).mean()


def soft_iou(logits: Tensor, edited: Tensor) -> Tensor:
    """Returns the intersection over union of the edited fractions of each clip's tokens: (B, V), (B, V) -> (B,)."""
    guess = logits.sigmoid()
    return torch.minimum(guess, edited).sum(1) / torch.maximum(guess, edited).sum(1)


def tokenizer_corpus() -> Iterator[str]:
    """Yields the tokenizer's training corpus; it contains no held-out phrasing."""
    yield from ["<|im_start|>user\n", "<|im_start|>assistant\n", "<0.3 seconds>", "<1.7 seconds>"] * 4
    for templates in PHRASINGS.values():
        for template in templates[: -phrasing.NUM_HELD_OUT]:
            yield from (template, as_typed(template, 1), as_typed(template, 2))
    yield from phrasing.OPENINGS
    yield from (f" {closing}" for closing in phrasing.CLOSINGS)
    for words in VOCABULARIES.values():
        yield from (f" {word}" for word in words for _ in range(2))
    options: Mapping[str, tuple[str, ...]]
    for options in (phrasing.LOOK_NOUNS, phrasing.PICK_PHRASES):
        yield from (noun for nouns in options.values() for noun in nouns)
    for nouns in (phrasing.BACKGROUND_NOUNS, phrasing.PLACE_PHRASES, phrasing.SIDE_PHRASES):
        yield from nouns.values()
