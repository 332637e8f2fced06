"""Parses layer specs: `first+last`, `1,-1`, `0:36:6`, in any mixture.

Layers are numbered like transformers' hidden_states: 0 is the input embedding, k the output of
decoder layer k, L (also -1 or `last`) that of the last one, after the final norm. `first` is layer 1, as in the paper.
"""

import re
import warnings
from collections.abc import Sequence

from .errors import UserError

NAMES = {"first": 1, "last": -1}
NUMBER = re.compile(r"-?\d+")
SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")
EXAMPLES = "first+last, last, 1,-1 or 0:36:6"


def parse_layers(spec: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Returns the layers of a spec, resolved to 0..num_layers, in the order written.

    Items are separated by `,` or `+`; a slice selects from 0..num_layers as in Python.
    Raises UserError with the column (from 1) of the item that cannot be parsed.
    """
    text = spec if isinstance(spec, str) else ",".join(str(k) for k in spec)
    layers: list[int] = []
    for column, item in _items(text):
        for k in _resolve(item, column, text, num_layers):
            if k in layers:
                raise _error(f"layer {k} is chosen twice", column, text, "each layer at most once")
            layers.append(k)
    return tuple(layers)


def check_layers(layers: Sequence[int], trained: Sequence[int], where: object = None) -> None:
    """Resolved layers against those that the DiT was trained with: raises UserError for another number, and for the same ones in another order.

    Other layers are no error, since each projection takes any layer's states, and studies of layers do so.
    """
    shown = {"where": where, "got": f"{len(layers)} ({_join(layers)})", "expected": f"{len(trained)} ({_join(trained)})"}
    if len(layers) != len(trained):
        raise UserError("the DiT was not made for that many layers", **shown, fix="choose them in MiVE Layer Select, or with --layers")
    if tuple(layers) != tuple(trained) and sorted(layers) == sorted(trained):
        raise UserError("the layers stand in another order than the DiT was trained with", **shown, fix="write them in that order, or choose none")


def warn_of_layers(layers: Sequence[int], trained: Sequence[int]) -> None:
    """Warns where resolved layers are other ones than the DiT was trained with."""
    if tuple(layers) != tuple(trained):
        warnings.warn(f"layers {_join(layers)} are read by a DiT that was trained with layers {_join(trained)}: expect a worse edit", stacklevel=2)


def _join(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _items(text: str) -> list[tuple[int, str]]:
    """(column, item) of each item, in order."""
    items, column = [], 1
    for piece in re.split(r"[,+]", text):
        item = piece.strip()
        items.append((column + len(piece) - len(piece.lstrip()) if item else column, item))
        column += len(piece) + 1
    return items


def _resolve(item: str, column: int, text: str, num_layers: int) -> list[int]:
    if not item:
        raise _error("a layer is missing", column, text, EXAMPLES)
    name = item.lower()
    if name in NAMES:
        return [NAMES[name] % (num_layers + 1)]
    if NUMBER.fullmatch(item):
        # no layer number has 10 digits, and int() refuses very long numerals
        k = int(item) if len(item) < 10 else num_layers + 1
        if not -num_layers - 1 <= k <= num_layers:
            raise _error(f"no layer {item[:20]}", column, text, f"{-num_layers - 1} to {num_layers}")
        return [k % (num_layers + 1)]
    match = SLICE.fullmatch(item)
    if not match or len(item) > 40:
        raise _error(f"cannot read {item[:40]!r}", column, text, EXAMPLES)
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise _error("a slice's step must not be 0", column, text, "start:stop:step")
    chosen = list(range(num_layers + 1))[start:stop:step]
    if not chosen:
        raise _error(f"the slice {item!r} is empty", column, text, f"layers of 0 to {num_layers}")
    return chosen


def _error(what: str, column: int, text: str, expected: str) -> UserError:
    shown = text if len(text) <= 60 else text[:57] + "..."
    return UserError(what, where=f"layers, column {column}", got=repr(shown), expected=expected)
