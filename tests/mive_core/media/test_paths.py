"""Folders are written whole or not at all, and leave nothing behind."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mive_core.data.tables import write_table
from mive_core.errors import UserError
from mive_core.formats.safetensors_file import DTYPE_NAMES, stream_tensors, write_tensors
from mive_core.media.images import write_frames
from mive_core.media.paths import atomic_folder, remove_partial_files
from mive_core.media.video import write_video
from mive_core.types import Clip


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


def test_a_video_takes_the_place_of_what_killed_runs_left_of_it(tmp_path):
    """A killed `mive edit` left its unfinished file beside the output for ever."""
    write(tmp_path, ".a.123.partial.mp4", "")
    write(tmp_path, ".frames.123.ab_c1.partial/new/00000.png", "")
    write(tmp_path, ".other.123.partial.mp4", "of another one, which may be running")
    write_video(tmp_path / "a.mp4", Clip(torch.zeros(1, 32, 32, 3), 8.0))
    write_video(tmp_path / "frames", Clip(torch.zeros(1, 32, 32, 3), 8.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.123.partial.mp4", "a.mp4", "frames"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permissions of this kind")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_what_is_written_for_others_can_be_read_by_them(tmp_path, umask, mode):
    """Checkpoints and LoRAs were readable by their owner alone: safetensors' save_file makes them so."""
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "lora.safetensors", {"x": torch.ones(2)}, {})
        stream_tensors(tmp_path / "dit.safetensors", {"x": (torch.float32, (2,))}, lambda key: torch.ones(2), {})
        write_video(tmp_path / "clip.mp4", Clip(torch.zeros(1, 32, 32, 3), 8.0))
        write_table(tmp_path / "pairs.jsonl", [{"source": "clip.mp4"}])
        with atomic_folder(tmp_path / "set") as folder:
            write_tensors(folder / "shard.safetensors", {"x": torch.ones(2)}, {})
            write_frames(folder / "frames", torch.zeros(1, 32, 32, 3))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6 and {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: mode for path in files}
    assert (tmp_path / "set" / "frames").stat().st_mode & 0o777 == 0o777 & ~umask == (tmp_path / "set").stat().st_mode & 0o777


def test_every_dtype_comes_back(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.ones(0, 2), "turned": torch.arange(6.0).reshape(2, 3).T, "odd": torch.ones(3, dtype=torch.bool)}
    write_tensors(tmp_path / "all.safetensors", tensors, {"a": "b"})
    with safe_open(tmp_path / "all.safetensors", "pt") as file:
        assert file.metadata() == {"a": "b"}
    got = load_file(tmp_path / "all.safetensors")
    assert got.keys() == tensors.keys()
    assert all(got[key].dtype == value.dtype and torch.equal(got[key].float(), value.float()) for key, value in tensors.items())
