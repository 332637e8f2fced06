"""Pairs to measure on: drawn clips of the held-out split, and known looks and recolourings of real footage."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UserError
from ..types import Clip, EditRequest, PairedEdit
from .synth import PHRASINGS, PairedEdits, apply_look
from .synth.phrasing import LOOK_NOUNS, NUM_HELD_OUT

FOOTAGE_LOOKS = ("night", "sepia", "grayscale", "warm", "cool", "invert", "faded", "pink")
# what green becomes: for each channel out, which one it is read from
GREEN_BECOMES = {"red": (1, 2, 2), "blue": (2, 2, 1), "purple": (1, 2, 1)}
LEAST_GREEN = 0.05  # of the pixels


def drawn_pairs(edits: PairedEdits, num_pairs: int) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """The first pairs of a synthetic set, each with its kind and edit."""
    for index in range(num_pairs):
        sample = edits.sample(index)
        yield sample.pair, {"kind": sample.labels.kind, "edit": sample.labels.edit}


def footage_pairs(clip: Clip, looks: tuple[str, ...] = FOOTAGE_LOOKS) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """One pair a look, with a phrasing that training never uses. There is no mask: the whole frame is edited."""
    phrasings = PHRASINGS["look"][-NUM_HELD_OUT:]
    for index, look in enumerate(looks):
        target = apply_look(look, clip.frames)
        instruction = phrasings[index % len(phrasings)].format(what=LOOK_NOUNS[look][0])
        yield (PairedEdit(EditRequest(clip, target[0], instruction), target, None, f"footage-{look}"),
               {"kind": "footage", "edit": look})


def recolour_pairs(clip: Clip) -> Iterator[tuple[PairedEdit, dict[str, str]]]:
    """One pair a new colour of what is green in the clip; the mask is found by a colour threshold.

    Raises UserError where less than LEAST_GREEN of the pixels are green.
    """
    mask = is_green(clip.frames)
    if mask.float().mean() < LEAST_GREEN:
        raise UserError("there is too little green in the clip to recolour", got=f"{mask.float().mean():.1%} of the pixels", expected=f"{LEAST_GREEN:.0%} or more")
    for colour, channels in GREEN_BECOMES.items():
        target = torch.where(mask[..., None], clip.frames[..., list(channels)], clip.frames)
        yield (PairedEdit(EditRequest(clip, target[0], f"make the green grass {colour}"), target, mask, f"green-to-{colour}"),
               {"kind": "footage", "edit": "recolour"})


def is_green(frames: Tensor) -> Tensor:
    """(..., 3) in 0..1 -> (...) bool: clearly more green than blue, no less than red, and no gray."""
    red, green, blue = frames.unbind(-1)
    return (green > 1.12 * blue) & (green > 0.97 * red) & (frames.amax(-1) - frames.amin(-1) > 0.08)
