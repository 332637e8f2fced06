"""Synthetic clips and paired edits with exact ground truth, for training and evaluation."""

from .background import Footage
from .labels import BACKGROUNDS, COLOURS, EDITS, KINDS, LOOKS, PICKS, PLACES, SHAPES, VOCABULARIES, EditLabels, is_held_out
from .looks import LOOKS_FN, apply_look
from .paired_edits import REVISION, EditedObject, PairedEdits, SyntheticEdit
from .phrasing import PHRASINGS
from .random_scenes import random_clip

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "EDITS",
    "KINDS",
    "LOOKS",
    "LOOKS_FN",
    "PHRASINGS",
    "PICKS",
    "PLACES",
    "REVISION",
    "SHAPES",
    "VOCABULARIES",
    "EditLabels",
    "EditedObject",
    "Footage",
    "PairedEdits",
    "SyntheticEdit",
    "apply_look",
    "is_held_out",
    "random_clip",
]
