"""Work that can be stopped at any moment: each outcome is a line of a file, and what is known is not done again.

`worked_through` is how every command of many items runs: resumed, in this process or on Ray, the bad left out and named.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import UserError
from .executor import Executor, Worker, run_items
from .manifest import ManifestEntry


@dataclass(frozen=True)
class Task:
    """One item, by what it depends on: a change of that is another task."""

    mark: str
    title: str  # for messages
    item: Any


@dataclass(frozen=True)
class Outcome:
    """What became of a task: one of the two is there."""

    title: str
    result: dict | None = None
    why: str = ""


class Journal:
    """A file of JSON lines, {"mark", "title"} with "result" or "why"; of two lines of one mark the later counts."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict]:
        """What is known, by mark. A last line that a kill has cut is taken off the file. Raises UserError for a file that is no journal."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"cannot be opened ({error.strerror})", where=f"journal {str(self.path)!r}") from None
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        try:
            return {line["mark"]: line for line in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "this is no journal of earlier work", where=f"journal {str(self.path)!r}", got=str(error), fix="choose another output, or remove it"
            ) from None

    def add(self, line: dict) -> None:
        """On the disk when it returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def worked_through(
    tasks: Sequence[Task],
    make: Callable[[], Worker],
    path: Path,
    executor: Executor = Executor(),
    what: str = "items",
    is_there: Callable[[dict], bool] = lambda result: True,
) -> list[Outcome]:
    """The outcome of every task, in their order; those that `path` holds with a result are not done again, the left out are tried again.

    `is_there` says whether the files that a result names still are. Raises UserError where not one task can be used, and where the
    journal cannot be read or written.
    """
    journal = Journal(path)
    known = {mark: line for mark, line in journal.read().items() if "result" in line and is_there(line["result"])}
    missing = [task for task in {task.mark: task for task in tasks}.values() if task.mark not in known]
    try:
        for index, outcome in tqdm(run_items(make, [task.item for task in missing], executor), total=len(missing), desc=what, disable=None):
            task = missing[index]
            known[task.mark] = {"mark": task.mark, "title": task.title, **outcome}
            journal.add(known[task.mark])
    except OSError as error:
        raise UserError(f"could not be written ({error.strerror or error})", where=path, fix="check space and permissions") from error
    outcomes = [Outcome(task.title, known[task.mark].get("result"), known[task.mark].get("why", "")) for task in tasks]
    if not any(outcome.result is not None for outcome in outcomes):
        raise UserError(f"none of the {what} can be used", got=f"{len(outcomes)}, the first of which says: {outcomes[0].why}" if outcomes else "none")
    return outcomes


def mark_of(contract: Any, *entries: ManifestEntry) -> str:
    """Of what the work depends on and of the entries, with the length and time of each local file that they name."""
    files = [place for entry in entries for place in (entry.source, entry.reference, entry.target, entry.mask) if isinstance(place, Path)]
    marks = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    return hashlib.sha256(repr((contract, entries, marks)).encode()).hexdigest()
