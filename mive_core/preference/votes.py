"""The files of a comparison: the key of a page and the votes that raters downloaded from it.

Both carry a checksum, CRC-32 of their JSON without spaces. It finds what was cut, mixed up or edited by hand; it is no proof against a
forger, who could compute it anew.
"""

import json
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..media.paths import check_input, describe

KEY_FORMAT, VOTES_FORMAT = "mive-preference-key-1", "mive-preference-votes-1"
CHOICES = ("left", "right", "tie")
SCORES = range(1, 6)


@dataclass(frozen=True)
class Comparison:
    """Two edits of one clip, in the order in which the key has them."""

    clip: str
    first: str  # system
    second: str


@dataclass(frozen=True)
class Key:
    """What a page hides."""

    page: str
    systems: tuple[str, ...]
    clips: dict[str, str]  # token -> name
    videos: dict[str, tuple[str, str]]  # token -> (system, clip)
    comparisons: dict[str, Comparison]
    command: str = ""


@dataclass(frozen=True)
class Vote:
    """One choice of one rater."""

    rater: str
    comparison: str
    choice: str  # the system's name; "" for no difference
    is_left: bool | None  # whether the chosen video stood on the left; None for no difference
    milliseconds: int
    time: str  # ISO 8601


@dataclass(frozen=True)
class Score:
    """One rater's score of one video."""

    rater: str
    video: str
    score: int
    time: str


Item = TypeVar("Item", Vote, Score)


def read_key(path: str | Path) -> Key:
    """Raises UserError for anything but a whole, unedited key."""
    values, where = _read(path, "key", KEY_FORMAT)
    try:
        videos = {token: (video["system"], video["clip"]) for token, video in values["videos"].items()}
        comparisons = {token: Comparison(pair["clip"], videos[pair["first"]][0], videos[pair["second"]][0]) for token, pair in values["comparisons"].items()}
        clips = {token: clip["name"] for token, clip in values["clips"].items()}
        return Key(values["page"], tuple(values["systems"]), clips, videos, comparisons, values["command"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("the key is damaged", where=where, got=repr(error)[:80]) from None


def read_votes(paths: Sequence[str | Path], key: Key) -> tuple[list[Vote], list[Score]]:
    """The files of all raters -> their votes and scores.

    A rater is who gave the same name, capitals aside; of two votes of one rater on one pair the later one counts, with a warning. Raises
    UserError for files that are cut short, edited or of another page, and if there is no vote at all.
    """
    votes: list[Vote] = []
    scores: list[Score] = []
    spellings: dict[str, str] = {}
    sessions: dict[str, set[str]] = {}
    for path in paths:
        file_votes, file_scores, session = _read_rater(path, key, spellings)
        votes += file_votes
        scores += file_scores
        for rater in {vote.rater for vote in file_votes}:
            sessions.setdefault(rater, set()).add(session)
    latest = _latest(votes, lambda vote: (vote.rater, vote.comparison))
    num_replaced = len(set(votes)) - len(latest)
    if num_replaced:
        warnings.warn(f"{num_replaced} votes of the same rater on the same pair: the later one counts", stacklevel=2)
    several = sorted(rater for rater, own in sessions.items() if len(own) > 1)
    if several:
        warnings.warn(f"these raters began more than once and count as one person each: {', '.join(several)}", stacklevel=2)
    if not votes:
        raise UserError("there are no votes", got=f"{len(paths)} files without one")
    return latest, _latest(scores, lambda score: (score.rater, score.video))


def _latest(items: Sequence[Item], name_of: Callable[[Item], tuple]) -> list[Item]:
    """The last of the items of each name, by their times."""
    return list({name_of(item): item for item in sorted(items, key=lambda item: item.time)}.values())


def _read_rater(path: str | Path, key: Key, spellings: dict[str, str]) -> tuple[list[Vote], list[Score], str]:
    """Returns the file's votes, scores and session. `spellings` keeps each rater's name as it was first read."""
    values, where = _read(path, "votes", VOTES_FORMAT)
    if values.get("page") != key.page:
        fix = "give the key that was written beside that page"
        raise UserError("these votes are of another page", where=where, got=repr(values.get("page"))[:80], expected=repr(key.page), fix=fix)
    try:
        name = " ".join(values["rater"].split())
        rater = spellings.setdefault(name.casefold(), name)
        votes = [_vote(row, rater, key) for row in values["votes"]]
        scores = [Score(rater, row["video"], row["score"], str(row["time"])) for row in values["scores"]]
        if any(score.score not in SCORES or score.video not in key.videos for score in scores) or not rater:
            raise ValueError("a score outside 1 to 5, or of a video that the page does not have")
        return votes, scores, values["session"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError("the votes do not fit the page", where=where, got=str(error)[:120], fix="ask the rater for the file as it was downloaded") from None


def _vote(row: dict, rater: str, key: Key) -> Vote:
    comparison, choice = key.comparisons[row["comparison"]], row["choice"]
    systems = {side: key.videos[row[side]] for side in ("left", "right")}
    if {system for system, _ in systems.values()} != {comparison.first, comparison.second} or {clip for _, clip in systems.values()} != {comparison.clip}:
        raise ValueError(f"pair {row['comparison']} with other videos")
    if choice not in CHOICES:
        raise ValueError(f"the choice {choice!r}")
    is_tie = choice == "tie"
    return Vote(
        rater, row["comparison"], "" if is_tie else systems[choice][0], None if is_tie else choice == "left", int(row["milliseconds"]), str(row["time"])
    )


def checksum(values: dict[str, Any]) -> str:
    """CRC-32 of the JSON as JavaScript's JSON.stringify writes it, 8 hexadecimal digits. The values hold no fractions."""
    return f"{zlib.crc32(json.dumps(values, ensure_ascii=False, separators=(',', ':')).encode('utf-8', 'surrogatepass')):08x}"


def _read(path: str | Path, what: str, expected: str) -> tuple[dict, str]:
    """Returns the values without their checksum, and the file's name for messages."""
    path = check_input(path, what)
    where = f"{what} {str(path)!r}"
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=where, expected="a file") from None
    except ValueError as error:
        raise UserError("is no whole JSON file", where=where, got=f"{describe(path)}, {error}"[:160], fix="it may be cut short: ask for it again") from None
    if not isinstance(values, dict) or values.get("format") != expected:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"is no file of {what}", where=where, got=f"format {got!r}"[:80], expected=repr(expected))
    if values.pop("checksum", None) != checksum(values):
        raise UserError("was changed after it was written: its checksum does not fit", where=where, fix="use the file as it was downloaded")
    return values, where
