"""Instruction templates for each edit. The last phrasings of every list are never used in training."""

from collections.abc import Sequence

import numpy as np

from .edit_plan import Plan
from .edit_scenes import EditScenes
from .labels import NONE

NUM_HELD_OUT = 2  # phrasings at the end of each list of PHRASINGS

PHRASINGS = {
    "recolour": (
        "make {it} {new}",
        "turn {it} {new}",
        "paint {it} {new}",
        "change the colour of {it} to {new}",
        "recolour {it} in {new}",
        "{it} should be {new}",
        "give {it} a new colour, {new}",
        "i want {it} in {new}",
        "colour {it} {new}",
        "the colour of {it} should become {new}",
        "{new}, that is the colour {it} should have",
        "let {it} be {new} from now on",
        "can {it} be {new}",
        "show {it} in {new}",
        "dye {it}, it should come out {new}",
        "{it} in {new}",
        "change {it} so that it becomes {new}",
        "it is to be {new}, i mean {it}",
        "have {it} painted {new}",
        "edit the video so that {it} is {new} in every frame",
        "keep everything but make {it} {new}",
        "{it}: {new}",
        "set the colour of {it} to {new}",
        "i would rather have {it} {new}",
        "let {it} become {new}",
        "dye {it} {new} in every frame",
    ),
    "replace": (
        "replace {it} with {what}",
        "turn {it} into {what}",
        "swap {it} for {what}",
        "change {it} to {what}",
        "put {what} in place of {it}",
        "{it} should become {what}",
        "i want {what} instead of {it}",
        "make {it} into {what}",
        "let {it} become {what}",
        "substitute {what} for {it}",
        "{what} should take the place of {it}",
        "change {it} into {what}",
        "where {it} is, i want {what}",
        "show {what} in place of {it}",
        "instead of {it} there should be {what}",
        "in exchange for {it}, put in {what}",
        "have {what} where {it} was",
        "{it} is to be replaced by {what}",
        "let {what} move as {it} does now",
        "exchange {it}, i want {what}",
        "transform {it} into {what}",
        "not {it} but {what}",
        "edit the video so that {it} is {what} in every frame",
        "use {what} in place of {it}",
        "exchange {it} for {what}",
        "show {what} where {it} is",
    ),
    "remove": (
        "remove {it} from the video",
        "delete {it} from the clip",
        "take {it} away",
        "get rid of {it}",
        "erase {it} from the scene",
        "make {it} disappear",
        "i do not want {it} here",
        "clear {it} out of the picture",
        "remove {it}",
        "take {it} out of every frame",
        "let {it} vanish",
        "leave {it} out",
        "without {it}",
        "cut {it} away",
        "{it} is not wanted",
        "hide {it} and fill in what is behind",
        "wipe {it} out",
        "{it} should be gone",
        "{it} must go",
        "edit out {it}",
        "show the scene without {it}",
        "drop {it} from the clip",
        "delete {it}",
        "i want the video without {it}",
        "cut {it} out of the video",
        "leave out {it} in every frame",
    ),
    "add": (
        "add {what} {where}",
        "put {what} {where}",
        "insert {what} {where}",
        "place {what} {where}",
        "draw {what} {where}",
        "{where} there should be {what}",
        "i want {what} {where}",
        "show {what} {where}",
        "{where}, add {what}",
        "have {what} {where}",
        "give the scene {what} {where}",
        "set {what} {where}",
        "{what} should appear {where}",
        "paint {what} {where}",
        "there should be {what} {where}",
        "i would like {what} {where}",
        "let there be {what} {where}",
        "include {what}, {where}",
        "edit the video so that there is {what} {where}",
        "{where} i want {what} in every frame",
        "add one more thing {where}: {what}",
        "make {what} appear {where}",
        "let {what} appear {where}",
        "include {what} {where} in the video",
    ),
    "enter": (
        "let {what} come in from {side}",
        "add {what} that enters from {side}",
        "bring in {what} from {side}",
        "have {what} slide in from {side}",
        "{what} should enter from {side}",
        "add {what} coming in from {side}",
        "from {side}, let {what} come in",
        "make {what} enter from {side}",
        "{what} slides in from {side}",
        "i want {what} to come in from {side}",
        "show {what} moving in from {side}",
        "let {what} drift into the picture from {side}",
        "{what} should come from {side} and stay",
        "insert {what} that moves in from {side}",
        "from {side} there should come {what}",
        "have {what} enter the scene from {side}",
        "bring {what} into the clip, from {side}",
        "let {what} slide into view from {side}",
        "make {what} drift in from {side}",
        "from {side}, {what} should move in",
    ),
    "background": (
        "replace the background with {what}",
        "change the background to {what}",
        "use {what} as the background",
        "swap the background for {what}",
        "put {what} behind everything",
        "i want {what} as the background",
        "set the scene in front of {what}",
        "the background should be {what}",
        "make the background {what}",
        "turn the background into {what}",
        "behind everything there should be {what}",
        "let the background become {what}",
        "exchange what is behind for {what}",
        "{what} in the background",
        "show {what} behind the shapes",
        "give the video {what} as a backdrop",
        "keep the shapes but put {what} behind them",
        "everything should move in front of {what}",
        "the new backdrop is {what}",
        "place the shapes in front of {what}",
        "have {what} for a background",
        "draw {what} as the backdrop",
        "instead of this background i want {what}",
        "exchange the backdrop for {what}",
        "let everything move in front of {what}",
    ),
    "flat": (
        "make the background {new}",
        "paint the background {new}",
        "turn the background {new}",
        "change the background colour to {new}",
        "the background should be plain {new}",
        "i want a plain {new} background",
        "a {new} background",
        "set the background to {new}",
        "recolour the background in {new}",
        "use {new} as the background colour",
        "everything behind should be {new}",
        "the background is to be {new}",
        "give it a {new} background",
        "keep the shapes and let the rest be {new}",
        "fill the background with {new}",
        "{new} behind everything",
        "the whole backdrop should become {new}",
        "background in {new}",
        "let there be nothing but {new} behind",
        "colour what is behind {new}",
        "colour the whole background {new}",
        "let the background become {new}",
    ),
    "look": (
        "turn the video into {what}",
        "make it look like {what}",
        "give the video the look of {what}",
        "change the whole clip to {what}",
        "render the video as {what}",
        "i want it to look like {what}",
        "{what}",
        "make everything look like {what}",
        "it should look like {what}",
        "restyle it as {what}",
        "let it be {what}",
        "turn everything into {what}",
        "show the clip as {what}",
        "grade the video like {what}",
        "apply the style of {what}",
        "the whole video should look like {what}",
        "convert the clip to {what}",
        "make this {what}",
        "as if it were {what}",
        "i would like {what}",
        "let the whole clip become {what}",
        "edit the video so that it looks like {what}",
        "the look should be that of {what}",
        "change the colours so that it looks like {what}",
        "every frame should be {what}",
        "let everything look like {what}",
        "restyle the whole clip as {what}",
    ),
    "match": (
        "match the colours of the reference",
        "give the video the colours of the reference image",
        "grade the video like the reference",
        "copy the colour style of the reference",
        "make the whole video look like the reference",
        "use the colours of the first frame throughout",
        "apply the look of the reference to every frame",
        "let the video look like the reference image",
        "carry the colours of the reference through the clip",
        "the video should have the style of the reference",
        "the same colours as in the reference",
        "grade every frame like the first one",
        "take the colours from the reference",
        "make the clip match the reference image",
        "do to every frame what was done to the reference",
        "transfer the look of the reference image to the clip",
        "transfer the colours of the reference to the video",
        "let every frame have the colours of the reference",
    ),
}
OPENINGS = ("please", "please", "could you", "can you", "in this video,", "now", "i would like you to", "for the whole clip,", "hey,", "next,")
CLOSINGS = ("please", "in the video", "in every frame", "throughout", "and keep the rest", "but keep everything else", "for the whole clip", "thanks")
LOOK_NOUNS = {
    "night": ("a night scene", "a moonlit night"),
    "sepia": ("an old sepia photograph", "a picture in sepia tones"),
    "grayscale": ("a black and white film", "a grayscale picture"),
    "warm": ("a warm sunset", "a scene in warm golden light"),
    "cool": ("a cold winter day", "a scene in cool blue light"),
    "invert": ("a photographic negative", "a picture with inverted colours"),
    "contrast": ("a high contrast picture", "a scene with harsh contrast"),
    "faded": ("a faded old print", "a pale washed out picture"),
    "dark": ("a dim underexposed picture", "a very dark picture"),
    "bright": ("a bright overexposed picture", "a scene in glaring bright light"),
    "green": ("green night vision", "an old green monitor"),
    "pink": ("a rosy pink dream", "a scene in pink light"),
    "swap": ("a picture with red and blue swapped", "a picture with exchanged red and blue"),
}
BACKGROUND_NOUNS = {
    "flat": "a plain {new} surface",
    "gradient": "a gradient from {new} to {second}",
    "stripes": "{new} and {second} stripes",
    "checkers": "a {new} and {second} checkerboard",
    "bricks": "a brick wall",
    "grass": "green grass",
    "gravel": "gray gravel",
    "stars": "a sky full of stars",
}
PLACE_PHRASES = {
    "upper left": "in the upper left",
    "top": "at the top",
    "upper right": "in the upper right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "lower left": "in the lower left",
    "bottom": "at the bottom",
    "lower right": "in the lower right",
}
SIDE_PHRASES = {"left": "the left", "right": "the right", "top": "above", "bottom": "below"}
PICK_PHRASES = {
    "left": ("the left {thing}", "the {thing} on the left"),
    "right": ("the right {thing}", "the {thing} on the right"),
    "upper": ("the upper {thing}", "the {thing} at the top"),
    "lower": ("the lower {thing}", "the {thing} at the bottom"),
    "larger": ("the larger {thing}", "the big {thing}", "the bigger of the two {thing}s"),
    "smaller": ("the smaller {thing}", "the small {thing}", "the smaller of the two {thing}s"),
}


def instruct(rng: np.random.Generator, plan: Plan, scenes: EditScenes, tracks: list[np.ndarray], held_out: bool) -> str:
    """Draws the instruction for a plan; empty for the kind 'no instruction'.

    tracks: (F, 4) each, the edited body's first, then the others'; empty for edits of no body.
    """
    labels = plan.labels
    if labels.kind == "no instruction":
        return ""
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
    phrasings = PHRASINGS[topic]
    sentence = _choice(rng, phrasings[-NUM_HELD_OUT:]) if held_out else _add_filler_words(rng, _choice(rng, phrasings[:-NUM_HELD_OUT]))
    return sentence.format(**words).replace("a orange", "an orange")


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
