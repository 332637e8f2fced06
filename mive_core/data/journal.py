"""A journal of finished items, so that interrupted work resumes: one JSON line per item.

All commands that process many items use `run_resumable`, in this process or on Ray; it skips unusable items and reports them.
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
    """One item, identified by the fingerprint of everything its result depends on."""

    fingerprint: str  # "mark" in the journal
    title: str  # for messages
    item: Any


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task: a result, or the reason why it was skipped."""

    title: str
    result: dict | None = None
    why: str = ""


class Journal:
    """A file of JSON lines, {"mark", "title"} with "result" or "why"; a later line replaces an earlier one with the same mark."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict]:
        """Returns the lines by mark. Removes an incomplete last line from the file. Raises UserError if the file is not a journal."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"cannot be opened ({error.strerror})", where=f"journal {str(self.path)!r}") from None
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(self.path, len(complete))
        try:
            return {line["mark"]: line for line in map(json.loads, complete.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "this is no journal of earlier work", where=f"journal {str(self.path)!r}", got=str(error), fix="choose another output, or remove it"
            ) from None

    def add(self, line: dict) -> None:
        """Appends a line and flushes it to disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_resumable(
    tasks: Sequence[Task],
    make_worker: Callable[[], Worker],
    path: Path,
    executor: Executor = Executor(),
    what: str = "items",
    is_complete: Callable[[dict], bool] = lambda result: True,
) -> list[Outcome]:
    """Runs all tasks and returns their outcomes in order. Tasks with a result in the journal `path` are not repeated; skipped ones are.

    `is_complete` tells whether the files of an earlier result still exist. Raises UserError if no task is usable, or if the journal
    cannot be read or written.
    """
    journal = Journal(path)
    known = {mark: line for mark, line in journal.read().items() if "result" in line and is_complete(line["result"])}
    missing = [task for task in {task.fingerprint: task for task in tasks}.values() if task.fingerprint not in known]
    try:
        for index, outcome in tqdm(run_items(make_worker, [task.item for task in missing], executor), total=len(missing), desc=what, disable=None):
            task = missing[index]
            known[task.fingerprint] = {"mark": task.fingerprint, "title": task.title, **outcome}
            journal.add(known[task.fingerprint])
    except OSError as error:
        raise UserError(f"could not be written ({error.strerror or error})", where=path, fix="check space and permissions") from error
    lines = [known[task.fingerprint] for task in tasks]
    outcomes = [Outcome(task.title, line.get("result"), line.get("why", "")) for task, line in zip(tasks, lines)]
    if not any(outcome.result is not None for outcome in outcomes):
        raise UserError(f"none of the {what} can be used", got=f"{len(outcomes)}, the first of which says: {outcomes[0].why}" if outcomes else "none")
    return outcomes


def fingerprint(dependencies: Any, *entries: ManifestEntry) -> str:
    """Hashes the dependencies and the entries, with the size and modification time of each local file that they name."""
    files = [path for entry in entries for path in (entry.source, entry.reference, entry.target, entry.mask) if isinstance(path, Path)]
    versions = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    return hashlib.sha256(repr((dependencies, entries, versions)).encode()).hexdigest()
