"""Folders are written whole or not at all, and leave nothing behind."""

import pytest

from mive_core.errors import UserError
from mive_core.media.paths import atomic_folder, remove_partial_files


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def test_entries_of_the_same_name_are_replaced_and_others_stay(tmp_path):
    out = tmp_path / "deep" / "out"
    for name in ("clip/a.png", "clip/b.png", "table.jsonl", "other/c.png"):
        write(out, name, "old")
    with atomic_folder(out) as partial:
        write(partial, "clip/a.png", "new")
        write(partial, "table.jsonl", "new")
        assert files(out)["clip/a.png"] == "old"
    assert files(out) == {"clip/a.png": "new", "table.jsonl": "new", "other/c.png": "old"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.joinpath("clip").stat().st_mode == out.joinpath("other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_all_as_it_was(tmp_path, error):
    write(tmp_path / "out", "a.png", "old")
    with pytest.raises(error), atomic_folder(tmp_path / "out") as partial:
        write(partial, "a.png", "new")
        raise error
    assert files(tmp_path) == {"out/a.png": "old"} and len(list(tmp_path.iterdir())) == 1


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="could not be written"), atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_removed(tmp_path):
    write(tmp_path, ".step.123.partial.safetensors", "")
    write(tmp_path, ".out.123.partial/original/00000.png", "")
    write(tmp_path, "kept.png", "")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]
    remove_partial_files(tmp_path)
