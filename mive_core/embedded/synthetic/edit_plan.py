"""The plan of a paired edit, drawn before its scenes: kind, edit and the labels of what changes."""

from dataclasses import dataclass, replace

import numpy as np

from ...errors import UserError
from .labels import COLOURS, KINDS, LOOKS, NONE, PICKS, SHAPES, EditLabels, is_held_out
from .looks import LOOKS_FN

KIND_ODDS = {
    # edits that need the instruction are harder to learn, so training has more of them. The kinds that only training has can be named for
    # the held-out split, too
    "train": {
        "seen in reference": 0.11,
        "enters late": 0.15,
        "two alike": 0.14,
        "instruction only": 0.15,
        "no instruction": 0.08,
        # the reference decides: the instruction does not foretell the result
        "loose words": 0.16,  # words leave open how strong, which shade, where and how large; the reference shows it
        "vague words": 0.09,  # "do what the reference shows"
        "wrong words": 0.06,  # the instruction of another edit
        "nothing asked": 0.06,  # the reference is the unedited first frame: the target is the source
    },
    "heldout": {"seen in reference": 0.57, "enters late": 0.14, "two alike": 0.11, "instruction only": 0.10, "no instruction": 0.08},
}
_REFERENCE_EDIT_ODDS = {"recolour": 0.17, "replace": 0.14, "remove": 0.115, "add": 0.14, "background": 0.145, "look": 0.29}
EDIT_ODDS = {
    "seen in reference": _REFERENCE_EDIT_ODDS,
    "no instruction": _REFERENCE_EDIT_ODDS,
    "loose words": {"recolour": 0.25, "replace": 0.14, "add": 0.1, "background": 0.15, "look": 0.6},
    "vague words": _REFERENCE_EDIT_ODDS,
    "wrong words": _REFERENCE_EDIT_ODDS,
    "nothing asked": {NONE: 1.0},
    "enters late": {"recolour": 0.35, "replace": 0.3, "remove": 0.2, "add": 0.15},
    "two alike": {"recolour": 0.4, "replace": 0.35, "remove": 0.25},
    "instruction only": {"recolour": 0.2, "replace": 0.15, "remove": 0.1, "add": 0.1, "background": 0.15, "look": 0.3},
}
OVERSAMPLING = {"train": {"replace": 3.0, "add": 1.5}, "heldout": {}}  # factors on the odds: new outlines are the hardest to learn
BACKGROUND_ODDS = {"flat": 0.4, "gradient": 0.2, "stripes": 0.08, "checkers": 0.08, "bricks": 0.06, "grass": 0.06, "gravel": 0.06, "stars": 0.06}
INSTRUCTION_BACKGROUND_ODDS = {"flat": 0.65, "gradient": 0.35}  # only backgrounds that an instruction determines completely

WORDS = {"no instruction": "none", "loose words": "loose", "vague words": "vague", "wrong words": "other"}  # kind -> Plan.words; others: exact
NOTHING_ASKED_ODDS = {"keep": 0.4, "none": 0.15, "other": 0.45}
ABSENT_EDIT_ODDS = {("seen in reference", edit): 1 / 3 for edit in ("recolour", "replace", "remove")}  # asked of an object that is not there
SAME_OBJECT_ODDS = 0.6  # wrong words name the object that is edited, with another edit


@dataclass(frozen=True)
class Plan:
    """The labels that are drawn first, and properties without a label."""

    labels: EditLabels  # labels.kind is a word of the VLM's vocabulary: 'seen in reference' for the kinds that only training has, or NONE
    kind: str = NONE  # a key of KIND_ODDS["train"]
    words: str = "exact"  # exact, loose, vague, keep, none or other: what the instruction tells of the edit
    said: "Plan | None" = None  # what words of an 'other' edit tell
    varied: bool = False  # motion, backgrounds, cuts and results that the reference shows vary more widely, see variation.py
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
    kind_odds = KIND_ODDS[split] if kinds is None else KIND_ODDS["train"] | KIND_ODDS[split]
    odds = {
        (kind, edit): kind_probability * edit_probability
        for kind, kind_probability in kind_odds.items()
        for edit, edit_probability in edit_odds(split, kind).items()
        if (kinds is None or kind in kinds) and (edits is None or edit in edits)
    }
    if not odds:
        raise UserError(
            "no paired edit is of these kinds and edits",
            got=f"kinds {kinds}, edits {edits}",
            expected=f"kinds among {', '.join(KIND_ODDS['train'])}; edits among {', '.join(_REFERENCE_EDIT_ODDS)}",
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
            break
    plan = replace(plan, kind=kind, words=WORDS.get(kind, "exact"), varied=not held_out or kind not in KIND_ODDS["heldout"])
    if kind == "nothing asked":
        plan = replace(plan, words=str(rng.choice(list(NOTHING_ASKED_ODDS), p=list(NOTHING_ASKED_ODDS.values()))))
    if plan.words != "other":
        return plan
    return replace(plan, said=draw_plan(rng, ABSENT_EDIT_ODDS, held_out) if kind == "nothing asked" else _other_edit(rng, plan, held_out))


def _other_edit(rng: np.random.Generator, plan: Plan, held_out: bool) -> Plan:
    """Draws what the wrong words tell: another edit, often of the same object."""
    labels, same_object = plan.labels, plan.labels.shape != NONE and rng.uniform() < SAME_OBJECT_ODDS
    odds = ABSENT_EDIT_ODDS if same_object else {("seen in reference", edit): p for edit, p in edit_odds("heldout", "seen in reference").items()}
    while True:
        said = draw_plan(rng, odds, held_out)
        if same_object:
            new_shape = labels.shape if said.labels.edit == "recolour" else said.labels.new_shape
            said = replace(said, labels=replace(said.labels, shape=labels.shape, colour=labels.colour, new_shape=new_shape))
        unseen = not held_out and any(is_held_out(c) for c in said.labels.combinations())
        no_edit = said.labels.look == LOOKS[1] or (said.labels.new_shape, said.labels.new_colour) == (labels.shape, labels.colour) != (NONE, NONE)
        if not unseen and not no_edit and _result(said.labels) != _result(labels):
            return said


def _result(labels: EditLabels) -> tuple[str, ...]:
    """Returns what an edit leads to."""
    return labels.edit, labels.new_shape, labels.new_colour, labels.look, labels.background


def _draw_candidate(rng: np.random.Generator, kind: str, edit: str) -> Plan:
    """Draws the labels of a plan of the kind and edit, from either split."""
    if edit == NONE:
        return Plan(EditLabels(NONE, NONE))
    kind = kind if kind in KINDS else "seen in reference"
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
