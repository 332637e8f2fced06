"""Draws the instruction of an edit."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .edit_plan import Plan
from .edit_scenes import EditScenes
from .labels import NONE, PLACES
from .phrases import BACKGROUND_NOUNS, CLOSINGS, LOOK_NOUNS, NUM_HELD_OUT, OPEN_PHRASINGS, OPENINGS, PHRASINGS, PICK_PHRASES, PLACE_PHRASES, SIDE_PHRASES


def instruct(rng: np.random.Generator, plan: Plan, scenes: EditScenes, tracks: list[np.ndarray], held_out: bool) -> str:
    """Draws the instruction for a plan; empty for plans without words.

    tracks: (F, 4) each, the edited body's first, then the others'; empty for edits of no body.
    """
    if plan.words == "none":
        return ""
    if plan.words in OPEN_PHRASINGS:
        return _phrasing(rng, OPEN_PHRASINGS[plan.words], held_out)
    if plan.said is not None:
        plan, scenes, tracks = plan.said, replace(scenes, named_place=_choice(rng, PLACES[1:])), []
    labels = plan.labels
    words = {"new": labels.new_colour}
    topic = labels.edit
    if topic == "look":
        topic = "match" if labels.look == "match" else "look"
        words["what"] = "" if topic == "match" else _choice(rng, LOOK_NOUNS[labels.look])
    elif topic == "background":
        topic = "flat" if labels.background == "flat" and rng.uniform() < 0.7 else "background"
        words["what"] = BACKGROUND_NOUNS[labels.background].format(new=labels.new_colour, second=plan.second_colour)
    elif topic == "add":
        topic = "enter" if plan.late else "add"
        words |= {"where": PLACE_PHRASES.get(scenes.named_place, ""), "side": SIDE_PHRASES[plan.side], "what": f"a {labels.new_colour} {labels.new_shape}"}
    else:
        same_colour = labels.new_colour == labels.colour and rng.uniform() < 0.6
        words["what"] = f"a {labels.new_shape}" if same_colour else f"a {labels.new_colour} {labels.new_shape}"
        words["it"] = _referring_expression(rng, plan, scenes, tracks)
    return _phrasing(rng, PHRASINGS[topic], held_out).format(**words).replace("a orange", "an orange")


def _phrasing(rng: np.random.Generator, phrasings: Sequence[str], held_out: bool) -> str:
    """Draws one of the phrasings of a split, for training sometimes with filler words."""
    return _choice(rng, phrasings[-NUM_HELD_OUT:]) if held_out else _add_filler_words(rng, _choice(rng, phrasings[:-NUM_HELD_OUT]))


def _add_filler_words(rng: np.random.Generator, phrasing: str) -> str:
    """Sometimes adds words without meaning before and after a phrasing, so that its length or its ends do not identify it."""
    opening = f"{_choice(rng, OPENINGS)} " if rng.uniform() < 0.2 else ""
    closing = f" {_choice(rng, CLOSINGS)}" if rng.uniform() < 0.2 else ""
    return opening + phrasing + closing


def _referring_expression(rng: np.random.Generator, plan: Plan, scenes: EditScenes, tracks: list[np.ndarray]) -> str:
    """Draws a referring expression: a description that fits the edited body and no other."""
    labels = plan.labels
    has_distractor = labels.pick != NONE
    others = [b for b in scenes.others if not has_distractor or (b.shape, b.colour) != (labels.shape, labels.colour)]
    nouns = [f"{labels.colour} {labels.shape}"] * 3
    if all(b.shape != labels.shape for b in others):
        nouns.append(labels.shape)
    if all(b.colour != labels.colour for b in others):
        nouns.append(f"{labels.colour} shape")
    noun = _choice(rng, nouns)
    if has_distractor:
        return _choice(rng, PICK_PHRASES[labels.pick]).format(thing=noun)
    names = [f"the {noun}"] * 3
    if not plan.late:
        names += [f"the shape {PLACE_PHRASES[place]}" for place in _outermost_sides(tracks)]
    return _choice(rng, names)


def _outermost_sides(tracks: list[np.ndarray]) -> list[str]:
    """Returns the sides towards which the first body is, in every frame, clearly further out than all others."""
    if len(tracks) < 2:
        return []
    rest = np.stack(tracks[1:])
    gap = tracks[0][:, 2].mean() * 0.8
    found = []
    for axis, (low, high) in enumerate((("left", "right"), ("top", "bottom"))):
        if (tracks[0][:, axis] + gap < rest[:, :, axis]).all():
            found.append(low)
        if (tracks[0][:, axis] - gap > rest[:, :, axis]).all():
            found.append(high)
    return found


def _choice(rng: np.random.Generator, words: Sequence[str]) -> str:
    """Draws an element uniformly."""
    return words[int(rng.integers(len(words)))]
