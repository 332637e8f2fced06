"""Pairs to measure on: drawn clips of the held-out split, and known looks over real footage."""

from collections.abc import Iterator

from ..types import Clip, EditRequest, PairedEdit
from .synth import PHRASINGS, PairedEdits, apply_look
from .synth.phrasing import LOOK_NOUNS, NUM_HELD_OUT

FOOTAGE_LOOKS = ("night", "sepia", "grayscale", "warm", "cool", "invert", "faded", "pink")


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
