import json
import os

import pytest
from PIL import Image

from mive_core.cli import main
from mive_core.commands.demo import demo_pairs
from mive_core.media.video import read_clip


def test_the_demo_clips_are_held_out_and_fit():
    footage, drawn = demo_pairs()
    assert drawn.name.startswith("heldout-") and drawn.mask.any() and not drawn.mask.all()
    assert drawn.request.source.frames.shape == (17, 96, 96, 3) and footage.request.source.frames.shape == (17, 360, 640, 3)
    assert footage.mask.float().mean() > 0.2 and (footage.target - footage.request.source.frames)[footage.mask].abs().mean() > 0.1


@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path, random_models, capsys):
    out = tmp_path / "out" / "demo"
    assert main(["demo", "--output", str(out), "--models", str(random_models), "--steps", "1"]) == 0
    assert str(out / "edited.mp4") in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["edited.mp4", "footage.mp4", "reference.png", "report.json", "sheet.png", "source.mp4"]
    report = json.loads((out / "report.json").read_text())
    assert report["clips"] == 2 and report["seconds"] > 0 and 2**28 < report["peak_rss_bytes"] < 3 * 2**30
    assert [row["video"] for row in report["per_clip"]] == ["footage.mp4", "edited.mp4"]
    assert read_clip(out / "edited.mp4").frames.shape == (17, 96, 96, 3) and read_clip(out / "footage.mp4").frames.shape == (17, 360, 640, 3)
    assert all(row["delivered"]["psnr_kept"] > row["psnr_kept"] for row in report["per_clip"])
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 1000
