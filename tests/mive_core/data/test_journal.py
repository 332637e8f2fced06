"""Many items worked through: resumed, the bad left out and named, in this process and on two workers of Ray."""

import json
import os
import sys
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from mive_core.data.executor import prefetch
from mive_core.data.journal import Journal, Task, fingerprint, run_resumable
from mive_core.data.manifest import ManifestEntry
from mive_core.data.ray_executor import RayExecutor
from mive_core.errors import UserError


@dataclass
class Squares:
    """Squares numbers, refuses 13, and counts what it did in a folder."""

    folder: Path
    stop_at: int = -1

    def read(self, item: int) -> int:
        if item == 13:
            raise UserError("thirteen cannot be squared")
        return item

    def work(self, item: int, read: int) -> dict:
        if item == self.stop_at:
            raise KeyboardInterrupt
        if item == 1000:
            raise torch.OutOfMemoryError("no room for a thousand")
        with open(self.folder / str(item), "a") as file:
            file.write("x")
        return {"square": read * read}


def tasks(*numbers: int) -> list[Task]:
    return [Task(f"mark {number}", f"number {number}", number) for number in numbers]


def test_what_is_done_is_not_done_again_and_the_bad_is_named(tmp_path):
    path = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        run_resumable(tasks(1, 13, 2, 3), lambda: Squares(tmp_path, stop_at=3), path)
    with open(path, "a") as file:
        file.write('{"mark": "mark 3", "resu')  # as a kill would leave it
    assert run_resumable(tasks(1, 1000), lambda: Squares(tmp_path), path)[1].why == "no room for a thousand"
    outcomes = run_resumable(tasks(1, 13, 2, 3, 4), lambda: Squares(tmp_path), path)
    assert [outcome.result and outcome.result["square"] for outcome in outcomes] == [1, None, 4, 9, 16]
    assert (outcomes[1].title, outcomes[1].why) == ("number 13", "thirteen cannot be squared")
    assert [(tmp_path / str(number)).read_text() for number in (1, 2, 3, 4)] == ["x"] * 4
    assert [json.loads(line)["mark"] for line in path.read_text().splitlines()] == ["mark 1", "mark 13", "mark 2", "mark 1000", "mark 13", "mark 3", "mark 4"]


def test_where_nothing_can_be_used_it_is_said(tmp_path):
    with pytest.raises(UserError, match="none of the pairs can be used; got 2, the first of which says: thirteen"):
        run_resumable([Task("a", "a", 13), Task("b", "b", 13)], lambda: Squares(tmp_path), tmp_path / "journal", what="pairs")


def test_a_file_that_is_no_journal_stays(tmp_path):
    path = tmp_path / "journal"
    path.write_text("my notes\n")
    with pytest.raises(UserError, match="no journal of earlier work"):
        run_resumable(tasks(1), lambda: Squares(tmp_path), path)
    assert path.read_text() == "my notes\n"


def test_a_changed_file_is_another_task(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"one")
    entry = ManifestEntry(video, None, "make it red", video)
    first = fingerprint("contract", entry)
    assert first == fingerprint("contract", entry) != fingerprint("another", entry)
    video.write_bytes(b"other")
    assert fingerprint("contract", entry) != first
    assert fingerprint("contract", ManifestEntry("s3://a/b.mp4", None, "x", "s3://a/c.mp4"))  # of a URL only the name is known


def test_the_next_is_read_while_one_is_worked_on():
    started = {number: threading.Event() for number in range(4)}

    def read(number: int) -> int:
        started[number].set()
        return number

    for number, value in prefetch(range(4), read):
        assert value() == number
        assert number == 3 or started[number + 1].wait(10)


def test_an_error_of_reading_comes_with_its_own_item():
    def read(number: int) -> int:
        if number == 1:
            raise UserError("bad")
        return number

    values = [value for _, value in prefetch(range(3), read)]
    assert (values[0](), values[2]()) == (0, 2)
    with pytest.raises(UserError, match="bad"):
        values[1]()


@pytest.fixture(scope="module")
def ray():
    return pytest.importorskip("ray", reason="ray is not installed: what runs on it is NOT tested")


def killed_squares(folder: Path):
    """Squares whose worker is killed the first time it meets 5, after having done its work. Ray's workers cannot import this file."""

    class Killed:
        def read(self, item: int) -> int:
            if item == 13:
                raise UserError("thirteen cannot be squared")
            return item

        def work(self, item: int, read: int) -> dict:
            (folder / f"{item}.out").write_text(str(read * read))
            if item == 5 and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), 9)
            return {"square": read * read}

    return Killed


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_doubles_nothing(ray, tmp_path):
    numbers = (*range(8), 13)
    outcomes = run_resumable(tasks(*numbers), killed_squares(tmp_path), tmp_path / "journal", RayExecutor("local", 2))
    assert (tmp_path / "killed").exists()
    assert [outcome.result and outcome.result["square"] for outcome in outcomes] == [n * n for n in range(8)] + [None]
    assert outcomes[-1].why == "thirteen cannot be squared"
    marks = [json.loads(line)["mark"] for line in (tmp_path / "journal").read_text().splitlines()]
    assert sorted(marks) == sorted(task.fingerprint for task in tasks(*numbers))
    assert [int((tmp_path / f"{n}.out").read_text()) for n in range(8)] == [n * n for n in range(8)]
    assert run_resumable(tasks(*numbers[:-1]), partial(pytest.fail, "nothing is left to do"), tmp_path / "journal") == outcomes[:-1]


def test_a_cluster_that_is_not_there(ray, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a running cluster would have left its address
    with pytest.raises(UserError, match="ray 'auto': there is no Ray cluster to be reached"):
        run_resumable(tasks(1), lambda: Squares(tmp_path), tmp_path / "journal", RayExecutor("auto"))


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'--ray needs the package ray.*pip install "mive\[ray\]"'):
        run_resumable(tasks(1), lambda: Squares(tmp_path), tmp_path / "journal", RayExecutor("local"))


def test_a_journal_is_read_line_by_line(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.read() == {}
    journal.add({"mark": "a", "title": "a", "why": "missing"})
    journal.add({"mark": "a", "title": "a", "result": {}})
    assert journal.read() == {"a": {"mark": "a", "title": "a", "result": {}}}
