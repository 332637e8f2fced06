"""The words that describe an edit, as closed vocabularies; index 0 is always 'none'.

The tiny VLM is taught to name them, one classifier for each field of EditLabels.
"""

from dataclasses import astuple, dataclass

from .looks import LOOKS_FN
from .shapes import DISTANCES

NONE = "none"
RGB = {
    "red": (0.86, 0.08, 0.10),
    "orange": (0.98, 0.52, 0.04),
    "yellow": (0.97, 0.90, 0.14),
    "green": (0.08, 0.62, 0.16),
    "cyan": (0.12, 0.82, 0.88),
    "blue": (0.10, 0.20, 0.86),
    "pink": (0.96, 0.42, 0.74),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.06),
}
KINDS = (NONE, "seen in reference", "enters late", "two alike", "instruction only", "no instruction")
EDITS = (NONE, "recolour", "replace", "remove", "add", "background", "look")
SHAPES = (NONE, *DISTANCES)
COLOURS = (NONE, *RGB)
PLACES = (NONE, "upper left", "top", "upper right", "left", "middle", "right", "lower left", "bottom", "lower right")
PICKS = (NONE, "left", "right", "upper", "lower", "larger", "smaller")
LOOKS = (NONE, "match", *LOOKS_FN)
BACKGROUNDS = (NONE, "flat", "gradient", "stripes", "checkers", "bricks", "grass", "gravel", "stars")


@dataclass(frozen=True)
class EditLabels:
    """What an edit does, in the words of the vocabularies."""

    kind: str
    edit: str
    shape: str = NONE  # the named object as it is in the source; none for add, background, look
    colour: str = NONE
    place: str = NONE  # where the edit acts, averaged over the clip
    pick: str = NONE  # which of two alike
    new_shape: str = NONE  # what is there afterwards; none where it was removed
    new_colour: str = NONE  # also a new background's (first) colour
    look: str = NONE
    background: str = NONE

    def indices(self) -> tuple[int, ...]:
        """Each field as its index into VOCABULARIES, in the order of the fields."""
        return tuple(words.index(word) for words, word in zip(VOCABULARIES.values(), astuple(self)))

    def combinations(self) -> frozenset[tuple[str, str, str]]:
        """(edit, shape or background, colour), of what the edit acts on and of what it leaves."""
        if self.edit == "look":
            return frozenset()
        pairs = ((self.shape, self.colour), (self.background if self.edit == "background" else self.new_shape, self.new_colour))
        return frozenset((self.edit, thing, colour) for thing, colour in pairs if thing != NONE)


VOCABULARIES = {
    "kind": KINDS,
    "edit": EDITS,
    "shape": SHAPES,
    "colour": COLOURS,
    "place": PLACES,
    "pick": PICKS,
    "new_shape": SHAPES,
    "new_colour": COLOURS,
    "look": LOOKS,
    "background": BACKGROUNDS,
}


def is_held_out(combination: tuple[str, str, str]) -> bool:
    """One combination in eight, spread evenly over edits, things and colours, by a rule that no seed changes."""
    edit, thing, colour = combination
    things = BACKGROUNDS if edit == "background" else SHAPES
    return (2 * EDITS.index(edit) + 3 * things.index(thing) + COLOURS.index(colour)) % 8 == 0
