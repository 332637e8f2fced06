"""`make train-demo`, line by line, with fewer steps."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mive_core.cli import main
from mive_core.formats.lora_file import read_lora
from mive_core.media.video import read_clip

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_the_road_at_tiny_size_ends_in_a_sheet_of_before_and_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mive_core").symlink_to(ROOT / "mive_core")
    recipe = yaml.safe_load((ROOT / "configs" / "train_demo.yaml").read_text()) | {"num_steps": 2, "num_warmup_steps": 1, "log_every": 1}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train_demo.yaml").write_text(yaml.safe_dump(recipe))
    target = re.search(r"^train-demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for line in target.replace("\t", "").splitlines():
        if not line.startswith("$(BIN)/mive "):
            subprocess.run(line, shell=True, check=True)
            continue
        command = line.removeprefix("$(BIN)/mive ").split()
        assert main(command + (["--steps", "1"] if command[0] in ("edit", "eval") else [])) == 0, line
    out = Path("out/train-demo")
    report, before = (json.loads((out / folder / "report.json").read_text()) for folder in (".", "before"))
    assert report["before"]["psnr_edited"] == before["psnr_edited"] != report["psnr_edited"] and report["clips"] == 2
    assert read_lora(out / "lora.safetensors").differences.keys() >= {"patch_embedding.weight", "context.fuse.weight"}
    assert read_clip(next((out / "edited").glob("*.mp4"))).frames.shape == (17, 96, 96, 3)
    with Image.open(out / "sheet.png") as after, Image.open(out / "before" / "sheet.png") as alone:
        assert after.height > alone.height  # one row more
