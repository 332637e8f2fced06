"""Questions and answers about scenes and paired edits, as a VLM is trained on: what is there, where, how many, which moves, what differs, what is asked.

Places are cells of a grid of 10 x 10 over the frame, written as two digits, column and row from the upper left corner, as Qwen3-VL writes
coordinates relative to the frame. A path is the places in the frames that the VLM samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...embedded.synthetic import SyntheticEdit
from ...embedded.synthetic.background import Backdrop, Footage
from ...embedded.synthetic.labels import COLOURS, NONE, PICKS, SHAPES
from ...embedded.synthetic.scene import Body, Scene
from ..captioned_clips import describe_backdrop

CELLS = 10  # per axis
ROUGH_CELLS = 4  # per axis, of the questions that go through the whole frame
OUTSIDE = "outside"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPPOSITE = dict(zip(PICKS[1:], ("right", "left", "lower", "upper", "smaller", "larger")))
RESTS = 0.08  # shortest path of what moves, relative to the frame's shorter side
QUESTIONS = {
    "caption": ("describe the video", "what is in the video?", "tell me what you see"),
    "count": ("how many shapes are in the first frame?", "how many shapes are there at first?"),
    "colour": ("what colour is the {shape}?", "which colour has the {shape}?"),
    "shape": ("which shape is {colour}?", "what is the shape that is {colour}?"),
    "rows": ("which {kind} are there, row by row?", "the {kind} of the first frame, row by row"),
    "place": ("where is the {name} {when}?", "at which place is the {name} {when}?"),
    "where": ("where is the {name}?", "locate the {name}", "find the {name} in every frame"),
    "moves": ("how does the {name} move?", "where does the {name} go?"),
    "what": ("what is at {place} in the first frame?", "which shape is at {place} at first?"),
    "differs": ("what differs between the image and the first frame?", "compare the image with the first frame", "what was changed in the image?"),
    "asked": ("what was asked?", "which change was asked for?", "how will the video change?"),
}
UNNAMED = ("caption", "count", "rows", "differs")  # topics whose questions tell nothing about the clip, so that what an instruction names helps none


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    topic: str  # a key of QUESTIONS
    question: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """A body of the source or the target, with a name that no other body of the source has."""

    body: Body
    name: str  # "red star", or "left red star" of two alike
    track: np.ndarray  # (F, 4) x, y, radius, angle in pixels
    size: tuple[int, int]

    def place(self, frame: int) -> str:
        """The cell in one frame, or OUTSIDE."""
        cells = [int(np.floor(CELLS * self.track[frame, axis] / self.size[axis])) for axis in (0, 1)]
        return f"{cells[0]}{cells[1]}" if all(0 <= cell < CELLS for cell in cells) else OUTSIDE

    def path(self, frames: Sequence[int]) -> str:
        return " ".join(self.place(frame) for frame in frames)

    def ways(self) -> str:
        """How it moves from the first frame to the last: "up and to the left"."""
        right, down = (self.track[-1, :2] - self.track[0, :2]) / min(self.size)
        ways = [word for moved, word in ((-down, "up"), (down, "down"), (-right, "to the left"), (right, "to the right")) if moved > RESTS]
        return " and ".join(ways) or "it rests"


class Conversation:
    """Asks and answers questions about a scene. `frames` are the numbers of the frames that the VLM sees."""

    topics: tuple[str, ...] = ("caption", "count", "colour", "shape", "rows", "place", "where", "moves", "what")

    def __init__(
        self,
        backdrop: Backdrop | Footage,
        bodies: Sequence[Body],  # from the back to the front
        times: np.ndarray,
        size: tuple[int, int],
        frames: Sequence[int],
        rng: np.random.Generator,
    ):
        self.times, self.size, self.frames, self.rng, self.backdrop = times, size, frames, rng, backdrop
        self.things = [self.thing(body, self.name_of(body)) for body in reversed(bodies)]  # from the front to the back

    def thing(self, body: Body, name: str) -> Thing:
        return Thing(body, name, body.motion.track(self.times, self.size), self.size)

    def name_of(self, body: Body) -> str:
        """Names a body of the scene."""
        return f"{body.colour} {body.shape}"

    def turns(self, num: int) -> Iterator[Turn]:
        """Yields `num` turns on different topics, as far as there are."""
        return (self.turn(str(topic)) for topic in self.rng.permutation(self.topics)[:num])

    def turn(self, topic: str) -> Turn:
        """Draws a question on a topic and answers it."""
        thing = self.things[int(self.rng.integers(len(self.things)))] if self.things else None
        if thing is None and topic not in ("caption", "differs"):
            topic = "count"
        words, answer = getattr(self, f"_{topic}")(thing)
        return Turn(topic, str(self.rng.choice(QUESTIONS[topic])).format(**words), answer)

    def _caption(self, thing: Thing | None) -> tuple[dict, str]:
        places = lambda one: f"at {one.place(0)}" if len(self.frames) == 1 else f"from {one.place(0)} to {one.place(-1)}"
        parts = [f"a {one.body.colour} {one.body.shape} {places(one)}" for one in sorted(self.things, key=lambda one: one.track[0, 0])]
        return {}, ", ".join([*parts, f"over {'a filmed view' if isinstance(self.backdrop, Footage) else describe_backdrop(self.backdrop)}"])

    def _count(self, thing: Thing | None) -> tuple[dict, str]:
        return {}, NUMBERS[sum(one.place(0) != OUTSIDE for one in self.things)]

    def _colour(self, thing: Thing) -> tuple[dict, str]:
        alike = sorted({one.body.colour for one in self.things if one.body.shape == thing.body.shape})
        return {"shape": thing.body.shape}, " and ".join(alike)

    def _shape(self, thing: Thing) -> tuple[dict, str]:
        alike = sorted({one.body.shape for one in self.things if one.body.colour == thing.body.colour})
        return {"colour": thing.body.colour}, " and ".join(alike)

    def _rows(self, thing: Thing) -> tuple[dict, str]:
        kind = str(self.rng.choice(("colour", "shape")))
        points = [(np.array([column, row]) + 0.5) * self.size / ROUGH_CELLS for row in range(ROUGH_CELLS) for column in range(ROUGH_CELLS)]
        found = [self.at(point) for point in points]
        return {"kind": f"{kind}s"}, " ".join("nothing" if one is None else getattr(one.body, kind) for one in found)

    def _place(self, thing: Thing) -> tuple[dict, str]:
        frame, when = ((0, "at first"), (-1, "at last"))[int(self.rng.integers(2))]
        return {"name": thing.name, "when": when}, thing.place(frame)

    def _where(self, thing: Thing) -> tuple[dict, str]:
        return {"name": thing.name}, thing.path(self.frames)

    def _moves(self, thing: Thing) -> tuple[dict, str]:
        return {"name": thing.name}, thing.ways()

    def _what(self, thing: Thing) -> tuple[dict, str]:
        inside = [one for one in self.things if one.place(0) != OUTSIDE]
        if not inside or self.rng.uniform() < 0.2:
            place = f"{self.rng.integers(CELLS)}{self.rng.integers(CELLS)}"
            front = self.at((np.array([int(place[0]), int(place[1])]) + 0.5) * self.size / CELLS)
            return {"place": place}, "nothing" if front is None else f"a {front.name}"
        one = inside[int(self.rng.integers(len(inside)))]
        front = self.at(one.track[0, :2])
        assert front is not None  # itself, or what covers it
        return {"place": one.place(0)}, f"a {front.name}"

    def at(self, point: np.ndarray) -> Thing | None:
        """What is at a point of the first frame, x and y in pixels; the front one of several."""
        return next((one for one in self.things if np.hypot(*(one.track[0, :2] - point)) < one.track[0, 2]), None)


class StillConversation(Conversation):
    """Of the first frame alone."""

    topics = ("caption", "count", "colour", "shape", "rows", "where", "what")

    def __init__(self, scene: Scene, size: tuple[int, int], rng: np.random.Generator):
        super().__init__(scene.backdrop, scene.bodies, np.zeros(1), size, (0,), rng)


class EditConversation(Conversation):
    """Of a paired edit without a cut."""

    topics = (*Conversation.topics, "differs")

    def __init__(self, edit: SyntheticEdit, frames: Sequence[int], rng: np.random.Generator):
        (shot,) = edit.shots
        scenes, labels = shot.scenes, edit.labels
        _, height, width, _ = edit.pair.request.source.frames.shape
        self.edit, self.edited = edit, scenes.before
        bodies = list(scenes.others)
        if scenes.before is not None:
            bodies.insert(scenes.depth, scenes.before)
        super().__init__(scenes.backdrop, bodies, shot.times, (width, height), frames, rng)
        self.before = next((thing for thing in self.things if thing.body is scenes.before), None)
        self.after = None if scenes.after is None else self.thing(scenes.after, f"{labels.new_colour} {labels.new_shape}")

    def name_of(self, body: Body) -> str:
        """Names a body of the source; two alike by what tells them apart."""
        labels, name = self.edit.labels, super().name_of(body)
        if labels.pick == NONE or (body.colour, body.shape) != (labels.colour, labels.shape):
            return name
        return f"{labels.pick if body is self.edited else OPPOSITE[labels.pick]} {name}"

    def instructed_turns(self, num: int, instruction: str) -> Iterator[Turn]:
        """Yields what the instruction asks for, and turns whose questions name nothing."""
        yield Turn("asked", instruction, self.change())
        yield from (self.turn(str(topic)) for topic in self.rng.permutation(UNNAMED)[: num - 1])

    def change(self) -> str:
        """What the instruction asks for."""
        if self.before is None:
            assert self.after is not None
            return f"a {self.after.name} comes at {self.after.path(self.frames)}"
        start = f"the {self.before.name} at {self.before.path(self.frames)}"
        return f"{start} goes" if self.after is None else f"{start} becomes a {self.after.name}"

    def _differs(self, thing: Thing | None) -> tuple[dict, str]:
        if (self.edit.pair.request.reference == self.edit.pair.request.source.frames[0]).all():
            return {}, "nothing"
        if self.before is None:
            assert self.after is not None
            return {}, f"a {self.after.name} came at {self.after.place(0)}"
        start = f"the {self.before.name} at {self.before.place(0)}"
        return {}, f"{start} went" if self.after is None else f"{start} became a {self.after.name}"


def corpus() -> Iterator[str]:
    """Yields the words of all questions and answers, for a tokenizer."""
    for phrasings in QUESTIONS.values():
        for phrasing in phrasings:
            yield from (phrasing, phrasing)
    words = (OUTSIDE, *NUMBERS, *PICKS[1:], "goes", "becomes a", "comes at", "went", "became a", "came at", "nothing", "it rests", "from", "to", "at", "over")
    yield from (f" {word}" for word in words for _ in range(4))
    yield from (word for word in (*COLOURS[1:], *SHAPES[1:], *NUMBERS, OUTSIDE, "nothing", "up", "down", "it") for _ in range(4))  # as an answer begins
    yield "up and to the left, down and to the right, a plain gray surface, a gradient from dark to pale, a checkerboard, stripes, a filmed view"
