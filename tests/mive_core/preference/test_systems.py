import json
import shutil

import pytest
from preference_study import CLIPS, SYSTEMS

from mive_core.data.manifest import read_manifest
from mive_core.errors import UserError
from mive_core.preference.systems import read_systems


@pytest.fixture
def entries(study):
    return read_manifest(study / "pairs.jsonl")


def folders(study, *others):
    return [(SYSTEMS[0], str(study / SYSTEMS[0])), *others]


def test_a_folder_of_mive_edit(study, entries):
    systems = read_systems([(name, str(study / name)) for name in SYSTEMS], entries)
    assert [system.name for system in systems] == list(SYSTEMS)
    assert [path.name for path in systems[1].videos] == ["000000-a-cat.mp4", "000001-two-dogs.mp4", "000002-three.mp4"]


def test_a_part_of_what_was_edited(study, entries):
    """The rows of a shorter manifest have other numbers than the files."""
    (system, _) = read_systems([(name, str(study / name)) for name in SYSTEMS], entries[1:])
    assert [path.name for path in system.videos] == ["000001-two-dogs.mp4", "000002-three.mp4"]


def test_a_folder_of_mive_eval(study, entries, tmp_path):
    (tmp_path / "edited").mkdir()
    for index in range(3):
        shutil.copy(study / f"{index}.mp4", tmp_path / "edited" / f"{index:03d}.mp4")
    (tmp_path / "report.json").write_text(json.dumps({"per_clip": [{"name": name} for name in CLIPS]}), encoding="utf-8")
    (_, system) = read_systems(folders(study, ("eval", str(tmp_path))), entries)
    assert [path.name for path in system.videos] == ["000.mp4", "001.mp4", "002.mp4"]
    (_, system) = read_systems(folders(study, ("eval", str(tmp_path))), entries[::-1])
    assert [path.name for path in system.videos] == ["002.mp4", "001.mp4", "000.mp4"]
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="this is no evaluation, or a damaged one"):
        read_systems(folders(study, ("eval", str(tmp_path))), entries)


def test_a_folder_of_other_programs_by_the_clips_names(study, entries, tmp_path):
    for index, name in enumerate(CLIPS):
        shutil.copy(study / f"{index}.mp4", tmp_path / f"{name}.mp4")
    (_, system) = read_systems(folders(study, ("other", str(tmp_path))), entries)
    assert [path.stem for path in system.videos] == list(CLIPS)


def test_missing_clips_are_counted_and_named(study, entries, tmp_path):
    shutil.copy(study / "0.mp4", tmp_path / "three.mp4")
    with pytest.raises(UserError, match=r"every clip; got other lacks 2 of 3 \(a cat, two dogs\)"):
        read_systems(folders(study, ("other", str(tmp_path))), entries)


def test_equal_names_and_a_single_system(study, entries, tmp_path):
    with pytest.raises(UserError, match="two systems have one name"):
        read_systems(folders(study, *folders(study)), entries)
    with pytest.raises(UserError, match="one system alone"):
        read_systems(folders(study), entries)
    with pytest.raises(UserError, match="is no folder"):
        read_systems(folders(study, ("file", str(study / "0.mp4"))), entries)
