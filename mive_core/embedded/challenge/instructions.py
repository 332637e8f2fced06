"""Instructions of the challenge set. None of these sentences is one of training's (`../synthetic`)."""

from collections.abc import Mapping, Sequence

import numpy as np

SENTENCES = {
    "recolour": (
        "{it} needs another colour: {new}",
        "all the way through, {it} is {new}",
        "we want to see {it} painted in {new} instead",
        "new colour for {it}, make that {new}",
        "only {it} changes, to {new}",
        "from the first frame to the last one {it} has to look {new}",
    ),
    "replace": (
        "{it} has to go and {what} comes here instead",
        "trade {it} for {what}",
        "put in {what}, it moves just like {it} does",
        "what was {it} is {what} from now on",
        "{it} out, {what} in",
        "there should be {what} and not {it}",
    ),
    "remove": (
        "nothing should be left of {it}",
        "we do not want to see {it} any more",
        "fill the place of {it} with what is behind",
        "please clear away {it}",
        "{it} has to vanish from this scene",
        "the same video but with no {it_bare}",
    ),
    "background": (
        "only the backdrop changes: {what}",
        "all shapes stay, behind them comes {what}",
        "{what} should fill the scene behind the shapes",
        "move the shapes to a scene with {what}",
    ),
    "look": (
        "the full video in the style of {what}",
        "{what}, that is how it should look",
        "have the clip look more like {what}",
        "change the light and the colours to {what}",
    ),
    "vague": (
        "apply the change shown",
        "do the same in the rest of the clip",
        "like in the image",
        "now all of the other frames",
        "carry this change through",
        "edit it as shown",
        "as you see it here",
    ),
    "keep": ("everything should be kept as it was", "no change at all", "leave this clip just like it was", "do nothing", "the video should stay the same", ""),
}
LOOK_NAMES = {
    "split tone": "an old cinema film",
    "matte": "an old faded photograph",
    "warmer": "warm evening light",
    "cooler": "cool morning light",
    "lighter": "a bright day",
    "darker": "a dark evening",
    "turned hues": "another set of colours",
}
PICKS = {
    "left": "the {thing} that starts on the left",
    "right": "the {thing} that starts on the right",
    "upper": "the {thing} that starts at the top",
    "lower": "the {thing} that starts at the bottom",
    "larger": "the {thing} that is larger at the start",
    "smaller": "the {thing} that is smaller at the start",
}


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def write_sentence(rng: np.random.Generator, topic: str, words: Mapping[str, str]) -> str:
    """Draws one of SENTENCES[topic] with the words filled in; half of them begin with a capital letter."""
    sentence = choice(rng, SENTENCES[topic]).format(**words)
    return sentence[:1].upper() + sentence[1:] if rng.uniform() < 0.5 else sentence


def choice(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]
