"""Evaluation pairs: synthetic held-out clips, drawn objects over real footage, and looks and recolourings of footage with a computed target."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import UserError
from ..evaluation.evaluate import LOOK_STRENGTHS
from ..types import Clip, EditRequest, PairedEdit
from .synthetic import PHRASINGS, Footage, PairedEdits, apply_look
from .synthetic.looks import LUMA
from .synthetic.phrasing import LOOK_NOUNS, NUM_HELD_OUT

OBJECT_EDITS = ("recolour", "remove", "replace")
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples modulo 1 are evenly spread, however many there are
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
FOOTAGE_LOOKS = ("night", "sepia", "grayscale", "warm", "cool", "invert", "faded", "pink")
# recolouring of green: the input channel of each output channel
GREEN_BECOMES = {"red": (1, 2, 2), "blue": (2, 2, 1), "purple": (1, 2, 1)}
MIN_GREEN = 0.05  # smallest fraction of green pixels


def _luma(frames: Tensor) -> Tensor:
    """(..., 3) -> (..., 1)."""
    return (frames * torch.tensor(LUMA)).sum(dim=-1, keepdim=True)


def _split_tone(frames: Tensor, shadows: tuple[float, float, float], highlights: tuple[float, float, float]) -> Tensor:
    """Tints shadows and highlights differently and halves the saturation."""
    luma = _luma(frames)
    tint = (1 - luma) * torch.tensor(shadows) + luma * torch.tensor(highlights)
    return 0.5 * frames + 0.5 * luma + 0.6 * (tint - _luma(tint))


def _curve(frames: Tensor, slope: tuple[float, float, float]) -> Tensor:
    """Applies an S-curve from 0 to 1 to each channel."""
    slopes = torch.tensor(slope)
    return 0.5 + 0.5 * torch.tanh(slopes * (frames - 0.5)) / torch.tanh(slopes / 2)


# Colour grading looks that training never draws and that Look cannot represent: curves and tints that depend on brightness.
UNSEEN_LOOKS = {
    "teal and orange": lambda frames: _split_tone(frames, (0.0, 0.45, 0.55), (1.0, 0.6, 0.25)),
    "bleach bypass": lambda frames: _curve(0.35 * frames + 0.65 * _luma(frames), (5.0, 5.0, 5.0)),
    "cross processed": lambda frames: torch.stack([*_curve(frames, (6.0, 4.0, 1.0)).unbind(-1)[:2], 0.25 + 0.5 * frames[..., 2]], dim=-1),
    "duotone": lambda frames: torch.tensor((0.15, 0.05, 0.4)) + _luma(frames) * torch.tensor((0.85, 0.75, 0.1)),
    "solarised": lambda frames: 0.5 - 0.5 * torch.cos(1.5 * math.pi * frames),
    "infrared": lambda frames: torch.stack([frames[..., 1].sqrt(), frames[..., 0], frames[..., 2].square()], dim=-1),
    "aged film": lambda frames: 0.2 + 0.6 * _split_tone(frames, (0.3, 0.1, 0.35), (1.0, 0.9, 0.5)),
    "two tones of gray": lambda frames: _curve(_luma(frames).expand_as(frames), (12.0, 12.0, 12.0)),
}


def drawn_pairs(edits: PairedEdits, num_pairs: int) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields the first pairs of a synthetic set, each with its kind and edit."""
    for index in range(num_pairs):
        sample = edits.sample(index)
        yield sample.pair, {"kind": sample.labels.kind, "edit": sample.labels.edit}


def object_pairs(frames: Tensor, num_pairs: int, seed: int = 0, num_frames: int = 17) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields held-out pairs of OBJECT_EDITS whose drawn objects move over footage, frames (F, H, W, 3).

    Each pair takes num_frames consecutive frames of it, from a start of its own. Raises UserError if the footage is shorter, or if its
    size does not fit PairedEdits.
    """
    num_starts = len(frames) - num_frames + 1
    if num_starts < 1:
        raise UserError("the footage is shorter than the pairs", where="source", got=f"{len(frames)} frames", expected=f"{num_frames} or more")

    def footage(index: int) -> Footage:
        start = int(index * GOLDEN_RATIO % 1 * num_starts)
        return Footage(frames[start : start + num_frames].numpy())

    size = (frames.shape[2], frames.shape[1])
    edits = PairedEdits(seed, "heldout", size, num_frames, kinds=("seen in reference",), edits=OBJECT_EDITS, footage=footage)
    for index, (pair, labels) in enumerate(drawn_pairs(edits, num_pairs)):
        yield replace(pair, name=f"objects-{seed}-{index}"), {"kind": "objects over footage", "edit": labels["edit"]}


def footage_pairs(clip: Clip, looks: tuple[str, ...] = FOOTAGE_LOOKS) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields one pair per look, with a phrasing that training never uses. The mask is None, since the whole frame is edited."""
    phrasings = PHRASINGS["look"][-NUM_HELD_OUT:]
    for index, look in enumerate(looks):
        target = apply_look(look, clip.frames)
        instruction = phrasings[index % len(phrasings)].format(what=LOOK_NOUNS[look][0])
        yield (PairedEdit(EditRequest(clip, target[0], instruction), target, None, f"footage-{look}"), {"kind": "footage", "edit": look})


def unseen_look_pairs(clip: Clip) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields one pair per look of UNSEEN_LOOKS; the instruction only refers to the reference, in a phrasing that training never uses."""
    phrasings = PHRASINGS["match"][-NUM_HELD_OUT:]
    for index, (name, look) in enumerate(UNSEEN_LOOKS.items()):
        target = look(clip.frames).clamp(0, 1)
        yield (
            PairedEdit(EditRequest(clip, target[0], phrasings[index % len(phrasings)]), target, None, f"unseen-{name.replace(' ', '-')}"),
            {"kind": "footage", "edit": name},
        )


def look_strength_pairs(clip: Clip) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields each look of UNSEEN_LOOKS in each of STRENGTHS, from the source (0) to the look (1). Only the reference shows the strength."""
    for pair, labels in unseen_look_pairs(clip):
        for strength in STRENGTHS:
            target = torch.lerp(clip.frames, pair.target, strength).clamp(0, 1)
            request = replace(pair.request, reference=target[0])
            yield replace(pair, request=request, target=target, name=f"{pair.name}-{round(100 * strength)}"), {**labels, "kind": LOOK_STRENGTHS}


def recolour_pairs(clip: Clip) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """Yields one pair per new colour of the green parts of a clip; the mask is a colour threshold.

    Raises UserError if less than MIN_GREEN of the pixels are green.
    """
    mask = is_green(clip.frames)
    if mask.float().mean() < MIN_GREEN:
        raise UserError(
            "there is too little green in the clip to recolour", got=f"{mask.float().mean():.1%} of the pixels", expected=f"{MIN_GREEN:.0%} or more"
        )
    for colour, channels in GREEN_BECOMES.items():
        target = torch.where(mask[..., None], clip.frames[..., list(channels)], clip.frames)
        yield (
            PairedEdit(EditRequest(clip, target[0], f"make the green grass {colour}"), target, mask, f"green-to-{colour}"),
            {"kind": "footage", "edit": "recolour"},
        )


def is_green(frames: Tensor) -> Tensor:
    """(..., 3) in 0..1 -> (...) bool: clearly more green than blue, about as much green as red or more, and not gray."""
    red, green, blue = frames.unbind(-1)
    return (green > 1.12 * blue) & (green > 0.97 * red) & (frames.amax(-1) - frames.amin(-1) > 0.08)
