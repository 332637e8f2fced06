"""Many clips edited by one command: what is there is not edited again, a bad clip is left out and named."""

import json
import os

import pytest
import torch

from mive_core.cli import main
from mive_core.media.images import write_image
from mive_core.media.video import read_clip, write_video
from mive_core.types import Clip


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Three clips in a manifest, the second of which is no video."""
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", Clip(frames, 8.0))
    (tmp_path / "b.mp4").write_text("<html>not found</html>")
    write_image(tmp_path / "first.png", frames[0])
    lines = [{"source": f"{name}.mp4", "reference": "first.png", "instruction": f"make it {name}"} for name in "abc"]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(random_models, *more: str) -> list[str]:
    return ["edit", "--manifest", "clips.jsonl", "--output", "out", "--models", str(random_models), *more]


def test_many_clips(work, random_models, capsys):
    assert main(command(random_models)) == 0
    out, err = capsys.readouterr()
    assert out == "out/edits.jsonl: 2 done, 1 left out\n"
    assert err.count("\n") == 1 and "b.mp4 is left out: source 'b.mp4': is not a video" in err
    assert sorted(os.listdir("out")) == ["000000-a.mp4", "000002-c.mp4", "edits.jsonl"]
    assert read_clip("out/000000-a.mp4").frames.shape == (5, 32, 48, 3)
    one = ["edit", "--source", "c.mp4", "--reference", "first.png", "--instruction", "make it c", "--output", "one.mp4", "--models", str(random_models)]
    assert main(one) == 0 and (read_clip("one.mp4").frames - read_clip("out/000002-c.mp4").frames).abs().mean() < 0.01


def test_what_is_there_is_not_edited_again(work, random_models, capsys):
    assert main(command(random_models)) == 0
    times = {name: os.stat(f"out/{name}").st_mtime_ns for name in ("000000-a.mp4", "000002-c.mp4")}
    os.unlink("out/000002-c.mp4")
    (work / "b.mp4").write_bytes((work / "a.mp4").read_bytes())
    assert main(command(random_models)) == 0
    assert sorted(os.listdir("out")) == ["000000-a.mp4", "000001-b.mp4", "000002-c.mp4", "edits.jsonl"]
    assert os.stat("out/000000-a.mp4").st_mtime_ns == times["000000-a.mp4"]
    assert main(command(random_models, "--steps", "1")) == 0  # another setting: all anew
    assert os.stat("out/000000-a.mp4").st_mtime_ns != times["000000-a.mp4"]


@pytest.mark.parametrize(
    "more, says",
    [
        (("--source", "a.mp4"), "a manifest says all of that; got --manifest and --source"),
        (("--fps", "8"), "a manifest says all of that; got --manifest and --fps"),
        (("--frames", "9"), "none of the clips can be used; got 3, the first of which says: source 'a.mp4': the clip is shorter than asked"),
    ],
)
def test_what_cannot_be(work, random_models, capsys, more, says):
    assert main(command(random_models, *more)) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
    assert not [name for name in os.listdir(".") if name.endswith(".mp4") and name not in ("a.mp4", "b.mp4", "c.mp4")]


def test_bad_rows_are_left_out_by_number(work, random_models, capsys):
    (work / "clips.csv").write_text("source,reference,prompt,take\na.mp4,first.png,make it a,1\ngone.mp4,first.png,make it b,2\nb.mp4,first.png,make it b,3\n")
    assert main(["edit", "--manifest", "clips.csv", "--output", "out", "--models", str(random_models)]) == 0
    out, err = capsys.readouterr()
    assert out == "out/edits.jsonl: 1 done, 2 left out\n"
    assert "these columns are not used: take" in err and "row 2: clips.csv:3 is left out: " in err and "no such file" in err
    assert "row 3: b.mp4 is left out: source 'b.mp4': is not a video" in err
    assert sorted(os.listdir("out")) == ["000000-a.mp4", "edits.jsonl"]
