import csv
import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mive_core.data.manifest import ManifestPairs, export_pairs, load_entry, read_manifest, read_source, write_manifest
from mive_core.errors import UserError
from mive_core.media.images import write_frames
from mive_core.media.video import write_video
from mive_core.types import Clip, EditRequest, Keyframe, PairedEdit


def bytes_like(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random values that 8 bits hold exactly."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)) / 255


def pair(name: str = "one", num_frames: int = 5, fps: float = 8.0) -> PairedEdit:
    source, target = bytes_like(num_frames, 32, 48, 3), bytes_like(num_frames, 32, 48, 3, seed=1)
    return PairedEdit(EditRequest(Clip(source, fps), target[0], f"edit {name}"), target, bytes_like(num_frames, 32, 48, seed=2) > 0.5, name)


@pytest.fixture
def folder(tmp_path):
    """A source of 6 frames, a reference, a target, a mask as a still."""
    write_frames(tmp_path / "source", bytes_like(6, 32, 48, 3))
    write_frames(tmp_path / "target", bytes_like(6, 32, 48, 3, seed=1))
    Image.new("RGB", (48, 32), "red").save(tmp_path / "reference.png")
    Image.new("L", (48, 32), 255).save(tmp_path / "mask.png")
    return tmp_path


def write(folder, *lines: dict | str):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


LINE = {"source": "source", "reference": "reference.png", "instruction": "make it red"}


def test_pairs_come_back_as_they_were_written(tmp_path):
    pairs = [replace(pair("a b/c", fps=8.0), colour=(1.0, 0.2, 0.0)), pair("two", fps=12.5)]
    path = export_pairs(((p, {"kind": "late", "edit": "add"}) for p in pairs), tmp_path / "set")
    entries = read_manifest(path)
    assert [(entry.kind, entry.edit, entry.name) for entry in entries] == [("late", "add", "a b/c"), ("late", "add", "two")]
    for written, read in zip(pairs, ManifestPairs(entries)):
        assert torch.equal(read.request.source.frames, written.request.source.frames)
        assert read.request.source.fps == written.request.source.fps
        assert torch.equal(read.request.reference, written.request.reference)
        assert torch.equal(read.target, written.target) and torch.equal(read.mask, written.mask)
        assert read.colour == written.colour
        assert (read.request.instruction, read.name) == (written.request.instruction, written.name)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_keyframes_come_back_as_they_were_written(tmp_path, suffix):
    keyframes = (Keyframe(3, bytes_like(32, 48, 3, seed=7)), Keyframe(1, bytes_like(32, 48, 3, seed=8)))
    with_two, without = pair("one"), pair("two")
    with_two = replace(with_two, request=replace(with_two.request, keyframes=keyframes))
    written = read_manifest(export_pairs(((p, {}) for p in (with_two, without)), tmp_path / "set"))
    first, second = ManifestPairs(read_manifest(write_manifest(tmp_path / "set" / f"again{suffix}", written)))
    assert [keyframe.number for keyframe in first.request.keyframes] == [1, 3] and second.request.keyframes == ()
    assert all(torch.equal(read.image, known.image) for read, known in zip(first.request.keyframes, keyframes[::-1]))


def test_an_export_that_fails_leaves_nothing(tmp_path):
    def pairs():
        yield pair(), {}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_pairs(pairs(), tmp_path / "set")
    assert not os.listdir(tmp_path)


def test_a_line_without_truth(folder):
    loaded = load_entry(read_manifest(write(folder, LINE, ""))[0], num_frames=5)
    assert loaded.target is None and loaded.mask is None
    assert loaded.request.instruction == "make it red" and loaded.request.source.fps == 24.0


def test_frames_are_trimmed_alike(folder):
    line = LINE | {"target": "target", "mask": "mask.png", "fps": 8}
    with pytest.warns(UserWarning, match="6 are trimmed to 5"):
        loaded = load_entry(read_manifest(write(folder, line))[0])
    assert loaded.request.source.frames.shape == loaded.target.shape == (5, 32, 48, 3)
    assert loaded.mask.shape == (5, 32, 48) and loaded.mask.all()
    assert loaded.request.source.fps == 8.0


def test_everything_is_fitted_to_one_size(folder):
    line = LINE | {"target": "target", "mask": "mask.png"}
    loaded = load_entry(read_manifest(write(folder, line))[0], (96, 64), 5)
    assert loaded.request.reference.shape == (64, 96, 3)
    assert loaded.target.shape == (5, 64, 96, 3) and loaded.mask.shape == (5, 64, 96)


def test_videos_are_targets_and_masks_too(folder):
    white = torch.ones(6, 32, 48, 3)
    write_video(folder / "target.mp4", Clip(white * 0.5, 8.0))
    write_video(folder / "mask.mp4", Clip(white * torch.tensor([0.0, 1, 0, 1, 1, 0])[:, None, None, None], 8.0))
    loaded = load_entry(read_manifest(write(folder, LINE | {"target": "target.mp4", "mask": "mask.mp4"}))[0], num_frames=5)
    assert loaded.mask.all(dim=(1, 2)).tolist() == [False, True, False, True, True]
    assert not loaded.mask[0].any()


@pytest.mark.parametrize("key", ["target", "mask"])
def test_a_truth_shorter_than_its_source(folder, key):
    write_frames(folder / "short", bytes_like(3, 32, 48, 3))
    with pytest.raises(UserError, match=f"the {key} is shorter than the source; got 3 frames; expected 5"):
        load_entry(read_manifest(write(folder, LINE | {key: "short"}))[0], num_frames=5)


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object; got list"),
        ("[" * 5000, "not JSON"),
        ({**LINE, "instruction": None}, "the key 'instruction' is missing"),
        ({"source": "source", "instruction": "x"}, "the key 'reference' is missing"),
        ({**LINE, "refernce": "x"}, "unknown key 'refernce'"),
        ({**LINE, "source": 5}, "the key 'source' is not text; got 5"),
        ({**LINE, "source": "gone.mp4"}, "the key 'source'.*no such file"),
        ({**LINE, "target": "/gone/a.mp4"}, "the key 'target'.*no such file"),
        ({**LINE, "source": ""}, "the key 'source' is missing"),
        ({**LINE, "source_video": "source"}, "two keys say what the source is; got source, source_video"),
        ({**LINE, "target": "C:\\clips\\a.mp4"}, "the key 'target': not a path relative"),
        ({**LINE, "target": "clips\\a.mp4"}, "the key 'target': not a path relative"),
        ({**LINE, "mask": "../outside.png"}, "the key 'mask': leads outside"),
        ({**LINE, "mask": "link.png"}, "the key 'mask': leads outside"),
        ({**LINE, "mask": "a\0b"}, "the key 'mask'.*NUL"),
        ({**LINE, "colour": "red"}, "'colour' is not a colour; got red; expected #rrggbb"),
        ({**LINE, "keyframes": ["reference.png"]}, "'keyframes' is no object"),
        ({**LINE, "keyframes": {"last": "reference.png"}}, "a keyframe is the number of a frame and an image"),
        ({**LINE, "keyframes": {"4": 5}}, "a keyframe is the number of a frame and an image"),
        ({**LINE, "keyframes": {"4": "gone.png"}}, "keyframe 4.*no such file"),
        ({**LINE, "keyframes": {"4": "../outside.png"}}, "keyframe 4.*leads outside"),
        ({**LINE, "fps": 0}, "'fps' is not a frame rate; got 0"),
        ({**LINE, "fps": True}, "'fps' is not a frame rate"),
        ('{"source": "source", "reference": "reference.png", "instruction": "x", "fps": NaN}', "'fps' is not a frame rate"),
    ],
)
def test_bad_lines_are_named(folder, line, says):
    Image.new("L", (48, 32)).save(folder.parent / "outside.png")
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    with pytest.raises(UserError, match=rf"pairs\.jsonl:3(:\d+)?: .*{says}") as caught:
        read_manifest(write(folder, LINE, "", line))
    assert "\n" not in str(caught.value)


def test_manifests_that_are_none(tmp_path):
    for content, says in ((b"", "holds no lines"), (b"\xff\xfe\x00", "not UTF-8")):
        (tmp_path / "pairs.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_manifest(tmp_path / "pairs.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_manifest(tmp_path / "gone.jsonl")


def test_beside_a_target_the_reference_is_its_first_frame(folder):
    (entry,) = read_manifest(write(folder, {"source": "source", "target": "target", "instruction": "make it red"}))
    pair = load_entry(entry, num_frames=5)
    assert torch.equal(pair.request.reference, pair.target[0]) and not torch.equal(pair.target[0], pair.request.source.frames[0])


@pytest.mark.parametrize("length, says", [(4, "shorter than the source; got 4 frames"), (9, "longer than the source; got 9 frames"), (30, "longer")])
def test_a_truth_of_another_length_is_no_truth(folder, length, says):
    """A target that was longer used to be cut to the source without a word, so that a pair could be out of step."""
    write_frames(folder / "other", bytes_like(length, 32, 48, 3))
    with pytest.raises(UserError, match=f"the target is {says}"), pytest.warns(UserWarning, match="trimmed"):
        load_entry(read_manifest(write(folder, LINE | {"target": "other"}))[0])


def test_two_lengths_that_are_trimmed_to_one_are_one(folder):
    write_frames(folder / "other", bytes_like(8, 32, 48, 3))
    with pytest.warns(UserWarning, match="trimmed"):
        assert len(load_entry(read_manifest(write(folder, LINE | {"target": "other"}))[0]).target) == 5


def test_an_error_names_line_and_column(folder):
    for line, says in (
        ('{"source": "source", "refernce": "reference.png", "instruction": "x"}', r":2:22: unknown key 'refernce'"),
        ('{"source": "gone.mp4", "reference": "reference.png", "instruction": "x"}', r":2:2: the key 'source'"),
        ('{"source": "source",, "reference": "x"}', r":2:21: not JSON \(.*double quotes"),
        ('{"source": "source", "reference": "reference.png", "instruction":  " "}', r":2:52: the instruction is empty"),
    ):
        with pytest.raises(UserError, match=rf"pairs\.jsonl{says}"):
            read_manifest(write(folder, LINE, line), allow_empty_instruction=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_written_manifest_is_read_back(folder, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    entries = read_manifest(write(folder, LINE | {"target": "target", "fps": 8, "edit": "recolour"}, LINE | {"name": "żółw"}))
    assert read_manifest(write_manifest(folder / f"again{suffix}", entries)) == entries
    (folder / "elsewhere").mkdir()
    elsewhere = write_manifest(folder / "elsewhere" / f"again{suffix}", entries)
    assert [replace(entry, source=folder / "source") for entry in read_manifest(elsewhere)] == entries
    assert all(entry.source == folder / "source" for entry in read_manifest(elsewhere))


def test_a_row_of_parquet_is_named(folder):
    pytest.importorskip("pyarrow")
    write_manifest(folder / "pairs.parquet", read_manifest(write(folder, LINE, LINE | {"target": "target"})))
    for child in (folder / "target").iterdir():
        child.unlink()
    (folder / "target").rmdir()
    with pytest.raises(UserError, match=r"pairs\.parquet:2: the key 'target'.*no such file"):
        read_manifest(folder / "pairs.parquet")
    (folder / "pairs.parquet").write_bytes(b"<html>")
    with pytest.raises(UserError, match="is not a Parquet file"):
        read_manifest(folder / "pairs.parquet")


def test_parquet_without_its_package_says_what_to_install(folder, monkeypatch):
    (folder / "pairs.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'needs the package pyarrow.*pip install "mive\[data\]"'):
        read_manifest(folder / "pairs.parquet")


ROWS = [
    {"name": "a", "source": "source", "target": "target", "instruction": 'make it "red", now\nand bright', "fps": 12.5},
    {"name": "b", "source": "source", "reference": "reference.png", "instruction": "", "keyframes": {"4": "reference.png"}},
]


def write_csv(path, delimiter: str, rows: list[dict]):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows({key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()} for row in rows)


@pytest.mark.parametrize("name", ["pairs.csv", "semicolons.csv", "pairs.tsv", "pairs.json", "lines.json"])
def test_every_kind_of_table_says_the_same(folder, name):
    path = folder / name
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1) if name == "pairs.json" else "\n".join(map(json.dumps, ROWS)))
    else:
        write_csv(path, {"pairs.csv": ",", "semicolons.csv": ";", "pairs.tsv": "\t"}[name], ROWS)
    assert read_manifest(path) == read_manifest(write(folder, *ROWS))


def test_columns_of_other_names(folder):
    write_csv(folder / "pairs.csv", ",", [{"original_video": "source", "edited_video": "target", "prompt": "make it red", "duration": 5, "id": 7}])
    with pytest.warns(UserWarning, match="these columns are not used: duration, id; known are source"):
        (entry,) = read_manifest(folder / "pairs.csv")
    assert (entry.source, entry.target, entry.instruction) == (folder / "source", folder / "target", "make it red")


def test_absolute_paths(folder):
    (folder / "tables").mkdir()
    path = write(folder / "tables", LINE | {"source": str(folder / "source"), "reference": str(folder / "reference.png")})
    (entry,) = read_manifest(path)
    assert entry.source == folder / "source" and load_entry(entry, num_frames=5).request.source.frames.shape == (5, 32, 48, 3)
    with pytest.raises(UserError, match="1:2: the key 'source': not a path relative to the manifest"):
        read_manifest(path, absolute=False)


def test_bad_rows_are_entries_that_say_why(folder):
    (folder / "pairs.csv").write_text("source,target,instruction\nsource,target,make it red\ngone,target,x\nsource,target\nsource,target, \n")
    entries = read_manifest(folder / "pairs.csv", allow_empty_instruction=False, strict=False)
    assert [entry.problem == "" for entry in entries] == [True, False, False, False]
    for line, entry, said in zip((3, 4, 5), entries[1:], ("the key 'source'.*no such file", "columns; got 2; expected 3", "the instruction is empty")):
        with pytest.raises(UserError, match=rf"pairs\.csv:{line}: .*{said}"):
            load_entry(entry)
        with pytest.raises(UserError, match=said):
            read_source(entry)
        assert entry.title.endswith(f"pairs.csv:{line}")
    assert load_entry(entries[0], num_frames=5).target is not None


def test_a_manifest_of_bad_rows_is_bad(folder):
    path = write(folder, "{", "[1]", LINE | {"source": "gone"})
    with pytest.raises(UserError, match=r"none of the rows can be used; got 3, the first of which says: .*:1:2: not JSON"):
        read_manifest(path, strict=False)
    for content, said in (("[{", "not JSON"), ("[[1]]", "not a JSON object; got list")):
        (folder / "pairs.json").write_text(content)
        with pytest.raises(UserError, match=rf"pairs\.json:1(:3)?: {said}"):
            read_manifest(folder / "pairs.json")
