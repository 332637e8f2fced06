"""The plan of a paired edit, drawn before its scenes: kind, edit and the labels of what changes."""

from dataclasses import dataclass

import numpy as np

from ...errors import UserError
from .labels import COLOURS, LOOKS, NONE, PICKS, SHAPES, EditLabels, is_held_out
from .looks import LOOKS_FN

KIND_ODDS = {
    # edits that need the instruction are harder to learn, so training has more of them
    "train": {"seen in reference": 0.42, "enters late": 0.17, "two alike": 0.16, "instruction only": 0.17, "no instruction": 0.08},
    "heldout": {"seen in reference": 0.57, "enters late": 0.14, "two alike": 0.11, "instruction only": 0.10, "no instruction": 0.08},
}
_REFERENCE_EDIT_ODDS = {"recolour": 0.17, "replace": 0.14, "remove": 0.115, "add": 0.14, "background": 0.145, "look": 0.29}
EDIT_ODDS = {
    "seen in reference": _REFERENCE_EDIT_ODDS,
    "no instruction": _REFERENCE_EDIT_ODDS,
    "enters late": {"recolour": 0.35, "replace": 0.3, "remove": 0.2, "add": 0.15},
    "two alike": {"recolour": 0.4, "replace": 0.35, "remove": 0.25},
    "instruction only": {"recolour": 0.2, "replace": 0.15, "remove": 0.1, "add": 0.1, "background": 0.15, "look": 0.3},
}
OVERSAMPLING = {"train": {"replace": 3.0, "add": 1.5}, "heldout": {}}  # factors on the odds: new outlines are the hardest to learn
BACKGROUND_ODDS = {"flat": 0.4, "gradient": 0.2, "stripes": 0.08, "checkers": 0.08, "bricks": 0.06, "grass": 0.06, "gravel": 0.06, "stars": 0.06}
INSTRUCTION_BACKGROUND_ODDS = {"flat": 0.65, "gradient": 0.35}  # only backgrounds that an instruction determines completely


@dataclass(frozen=True)
class Plan:
    """The labels that are drawn first, and properties without a label."""

    labels: EditLabels
    second_colour: str = NONE  # second colour of a new background with a gradient or pattern
    late: bool = False  # the edited object starts outside the frame
    side: str = NONE  # side of the frame from which a late object enters

    @property
    def reference_shows_edit(self) -> bool:
        """Whether the reference is the edited first frame and shows the edit."""
        return not self.late and self.labels.kind in ("seen in reference", "no instruction")


def edit_odds(split: str, kind: str) -> dict[str, float]:
    """Returns edit -> probability within a kind."""
    weights = {edit: odds * OVERSAMPLING[split].get(edit, 1.0) for edit, odds in EDIT_ODDS[kind].items()}
    return {edit: weight / sum(weights.values()) for edit, weight in weights.items()}


def plan_odds(split: str, kinds: tuple[str, ...] | None, edits: tuple[str, ...] | None) -> dict[tuple[str, str], float]:
    """Returns (kind, edit) -> probability over the given kinds and edits (None: all). Raises UserError if no pair remains."""
    odds = {
        (kind, edit): kind_probability * edit_probability
        for kind, kind_probability in KIND_ODDS[split].items()
        for edit, edit_probability in edit_odds(split, kind).items()
        if (kinds is None or kind in kinds) and (edits is None or edit in edits)
    }
    if not odds:
        raise UserError(
            "no paired edit is of these kinds and edits",
            got=f"kinds {kinds}, edits {edits}",
            expected=f"kinds among {', '.join(KIND_ODDS[split])}; edits among {', '.join(_REFERENCE_EDIT_ODDS)}",
            fix="background and look edits never enter late and are never of two alike",
        )
    total = sum(odds.values())
    return {key: value / total for key, value in odds.items()}


def draw_plan(rng: np.random.Generator, odds: dict[tuple[str, str], float], held_out: bool) -> Plan:
    """Draws a plan: with `held_out` at least one of its combinations is held out, without it none is. Plans without combinations are in both."""
    kind, edit = list(odds)[int(rng.choice(len(odds), p=list(odds.values())))]
    while True:
        plan = _draw_candidate(rng, kind, edit)
        combinations = plan.labels.combinations()
        if not combinations or held_out == any(is_held_out(c) for c in combinations):
            return plan


def _draw_candidate(rng: np.random.Generator, kind: str, edit: str) -> Plan:
    """Draws a plan of the kind and edit, from either split."""
    if edit == "look":
        named = kind == "instruction only" or rng.uniform() < 0.65
        return Plan(EditLabels(kind, edit, look=_choice(rng, tuple(LOOKS_FN)) if named else LOOKS[1]))
    shape, new_shape = (str(s) for s in rng.permutation(SHAPES[1:])[:2])
    colour, new_colour = (str(c) for c in rng.permutation(COLOURS[1:])[:2])
    if edit == "background":
        odds = INSTRUCTION_BACKGROUND_ODDS if kind == "instruction only" else BACKGROUND_ODDS
        style = str(rng.choice(list(odds), p=list(odds.values())))
        plain = style in ("flat", "gradient", "stripes", "checkers")
        return Plan(EditLabels(kind, edit, background=style, new_colour=colour if plain else NONE), second_colour=new_colour)
    late = kind == "enters late" or (kind == "two alike" and rng.uniform() < 0.5)
    side = _choice(rng, ("left", "right", "top", "bottom"))
    pick = _choice(rng, PICKS[1:]) if kind == "two alike" else NONE
    if edit == "recolour":
        new_shape = shape
    elif edit == "replace" and rng.uniform() < 0.6:
        new_colour = colour
    elif edit == "remove":
        new_shape = new_colour = NONE
    elif edit == "add":
        shape = colour = NONE
    return Plan(EditLabels(kind, edit, shape, colour, pick=pick, new_shape=new_shape, new_colour=new_colour), late=late, side=side)


def _choice(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    """Draws a word uniformly."""
    return words[int(rng.integers(len(words)))]
