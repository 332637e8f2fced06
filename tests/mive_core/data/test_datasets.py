"""Folders laid out as the published sets are: what is whole becomes a manifest, the rest is counted and named."""

import json

import pytest

from mive_core.cli import main
from mive_core.data.manifest import read_manifest


@pytest.fixture
def openve(tmp_path):
    """Two tables, one with semicolons, one row of which lacks its video; a table of something else."""
    for name in ("local_add/a.mp4", "source/a.mp4", "global_style/b.mp4", "source/b.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "local_add.csv").write_text(
        'prompt,original_video,video\n"add a hat, a red one",source/a.mp4,local_add/a.mp4\nadd a cat,source/a.mp4,local_add/gone.mp4\n'
        ",source/a.mp4,local_add/a.mp4\nbroken,row\nx,/etc/hostname,../../etc/hostname\n"
    )
    (tmp_path / "csv" / "global_style.csv").write_text("original_video;video;prompt;score\nsource/b.mp4;global_style/b.mp4;as a\tpainting, in oil;9\n")
    (tmp_path / "csv" / "benchmark.csv").write_text("edited_type,prompt,original_video\nx,y,z\n")
    return tmp_path


def test_openve(openve, capsys):
    assert main(["data", "import", "openve", "--folder", str(openve), "--output", str(openve / "pairs.jsonl")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{openve / 'pairs.jsonl'}: 2 pairs, 4 left out\n"
    style, add = read_manifest(openve / "pairs.jsonl")
    assert (style.instruction, style.edit, style.reference) == ("as a painting, in oil", "global_style", None)
    assert (add.instruction, add.edit, add.name) == ("add a hat, a red one", "local_add", "a")
    assert (add.source, add.target) == (openve / "videos/source/a.mp4", openve / "videos/local_add/a.mp4")
    assert err.count("\n") == 4 and "local_add.csv:3 is left out: the target 'local_add/gone.mp4' is not there" in err
    assert "local_add.csv:4 is left out: there is no instruction" in err and "local_add.csv:5 is left out: 2 columns where the table has 3" in err
    assert len((openve / "pairs.left_out.jsonl").read_text().splitlines()) == 4


def test_one_kind_of_edit(openve, capsys):
    assert main(["data", "import", "openve", "--folder", str(openve), "--output", str(openve / "pairs.jsonl"), "--edit", "global_style"]) == 0
    assert [entry.edit for entry in read_manifest(openve / "pairs.jsonl")] == ["global_style"]


def test_senorita(tmp_path, capsys):
    for name in ("obj_swap_upload/1_org.mp4", "obj_swap_upload/1.mp4", "obj_removal_videos_upload2/2.mp4", "obj_removal_videos_upload/2_org.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "updated_data_obj_swap_videos.json").write_text(
        json.dumps(
            [
                {
                    "source_video_path": "./obj_swap_videos/1_org.mp4",
                    "target_video_path": "./obj_swap_videos/1.mp4",
                    "instruction": "turn the dog into a fox",
                    "enhanced_instruction": "...",
                },
                {"source_video_path": "./obj_swap_videos/1_org.mp4", "target_video_path": "./obj_swap_videos/gone.mp4", "instruction": "x"},
                {"other": 1},
                7,
            ]
        )
    )
    (tmp_path / "updated_data_obj_removal.json").write_text(
        json.dumps(
            [
                {
                    "source_video_path": "./obj_removal_videos/2_org.mp4",
                    "target_video_path": "./obj_removal_videos/2.mp4",
                    "instruction": "",
                    "enhanced_instruction": "take the car away",
                }
            ]
        )
    )
    (tmp_path / "config.json").write_text("{")
    assert main(["data", "import", "senorita", "--folder", str(tmp_path), "--output", str(tmp_path / "pairs.jsonl")]) == 0
    assert capsys.readouterr().out.endswith("2 pairs, 2 left out\n")
    removal, swap = read_manifest(tmp_path / "pairs.jsonl")
    assert (removal.edit, removal.instruction, removal.target) == ("obj_removal", "take the car away", tmp_path / "obj_removal_videos_upload2/2.mp4")
    assert (swap.edit, swap.instruction, swap.source) == ("obj_swap", "turn the dog into a fox", tmp_path / "obj_swap_upload/1_org.mp4")


@pytest.mark.parametrize(
    "layout, output, says",
    [
        ("openve", "pairs.jsonl", "holds no .csv tables"),
        ("senorita", "pairs.jsonl", "the folder holds no whole pair; got"),
        ("openvid", "pairs.jsonl", "invalid choice: 'openvid'"),
    ],
)
def test_folders_that_are_no_such_set(tmp_path, capsys, layout, output, says):
    (tmp_path / "data.json").write_text("{")
    assert main(["data", "import", layout, "--folder", str(tmp_path), "--output", str(tmp_path / output)]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
