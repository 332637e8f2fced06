"""The study of sizes at its smallest: one clip of four frames' latents, whole and at half its side."""

import pytest
import torch

from mive_core.cli import main
from mive_core.data.manifest import ManifestPairs, export_pairs, read_manifest
from mive_core.study.sizes import counted, measure_sizes
from mive_core.types import Clip, EditRequest, PairedEdit


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A clip of fine stripes, of which a square becomes red."""
    folder = tmp_path_factory.mktemp("sizes")
    frames = (torch.arange(64) // 2 % 2).float()[None, None, :, None].expand(5, 64, 64, 3) * 0.5 + 0.25
    target = frames.clone()
    target[:, 16:48, 16:48] *= torch.tensor([1.0, 0.3, 0.3])
    mask = (frames != target).any(-1)
    export_pairs([(PairedEdit(EditRequest(Clip(frames, 8.0), target[0], "make it red"), target, mask, name="stripes"), {})], folder)
    return folder / "pairs.jsonl"


def test_a_smaller_edit_takes_less_and_shows_less(manifest):
    reports = []
    measure_sizes(ManifestPairs(read_manifest(manifest), full_size=True), 1, reports.append, fractions=(1, 2))
    whole, half = (reports[-1]["measured"][fraction] for fraction in ("1", "2"))
    assert len(reports) == 2 and reports[-1]["clips"] == 1
    assert whole["clips"][0]["size"] == (64, 64) and half["clips"][0]["size"] == (32, 32)
    assert half["ceiling"]["psnr_kept"] < whole["ceiling"]["psnr_kept"]  # stripes of two pixels are lost
    assert half["delivered"]["psnr_kept"] > half["ceiling"]["psnr_kept"] + 3  # and come back from the source
    assert half["seconds"] > 0 and half["delivery_seconds"] > 0


def test_counts_are_those_of_the_papers_size():
    rows = counted((1, 2))
    assert rows["1"]["size"] == (1280, 720) and rows["1"]["share"] == rows["1"]["share_of_attention"] == 1
    assert 81_000 < rows["1"]["tokens"] < 86_000 and 0.18 < rows["832x480"]["share_of_attention"] < 0.2
    assert rows["2"]["share_of_attention"] < rows["2"]["share"] < rows["832x480"]["share"] < 0.3


def test_the_command_writes_its_report(manifest, tmp_path, capsys):
    assert main(["study", "sizes", "--manifest", str(tmp_path / "none.jsonl"), "--json", str(tmp_path / "sizes.json")]) == 2
    assert "none.jsonl" in capsys.readouterr().err and not (tmp_path / "sizes.json").exists()
    assert main(["study", "sizes", "--manifest", str(manifest), "--json", str(tmp_path / "sizes.txt")]) == 2
