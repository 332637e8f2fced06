"""Closed vocabularies that describe an edit; index 0 is always 'none'.

The tiny VLM learns to predict them with one classifier per field of EditLabels.
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
    """A description of an edit in words of the vocabularies."""

    kind: str
    edit: str
    shape: str = NONE  # the edited object in the source; none for add, background, look
    colour: str = NONE
    place: str = NONE  # location of the edit, averaged over the clip
    pick: str = NONE  # which of two identical objects
    new_shape: str = NONE  # the object after the edit; none if removed
    new_colour: str = NONE  # also the (first) colour of a new background
    look: str = NONE
    background: str = NONE

    def indices(self) -> tuple[int, ...]:
        """Returns each field's index in its vocabulary, in the order of the fields."""
        return tuple(words.index(word) for words, word in zip(VOCABULARIES.values(), astuple(self)))

    def combinations(self) -> frozenset[tuple[str, str, str]]:
        """Returns (edit, shape or background, colour) of the edit's input and of its result."""
        if self.edit == "look":
            return frozenset()
        pairs = ((self.shape, self.colour), (self.background if self.edit == "background" else self.new_shape, self.new_colour))
        return frozenset((self.edit, shape, colour) for shape, colour in pairs if shape != NONE)


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
    """Whether the combination (see EditLabels.combinations) is held out: one in eight, evenly over edits, shapes and colours, independent of seeds."""
    edit, shape, colour = combination
    shapes = BACKGROUNDS if edit == "background" else SHAPES
    return (2 * EDITS.index(edit) + 3 * shapes.index(shape) + COLOURS.index(colour)) % 8 == 0
