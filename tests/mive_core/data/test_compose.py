"""Portraits over backgrounds: exact masks, the three pairs, what is left out; persons found by a small random SegFormer."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from mive_core.cli import main
from mive_core.data.compose import over
from mive_core.data.manifest import load_entry, read_manifest
from mive_core.data.segment_person import Segmenter
from mive_core.errors import UserError
from mive_core.media.images import write_frames
from mive_core.media.video import write_video
from mive_core.types import Clip


def noise(seed: int, num_frames: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (num_frames, 32, 48, 3), generator=torch.Generator().manual_seed(seed)) / 255


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Two people with masks, one of them soft at its edge, a third whose video is none, and two backgrounds."""
    for name in ("anna", "berta"):
        write_frames(tmp_path / name, noise(len(name)))
    alpha = torch.zeros(5, 32, 48, 3)
    for frame in range(5):
        alpha[frame, 8:24, 8 + frame : 24 + frame] = 1
        alpha[frame, 8:24, 24 + frame] = 128 / 255
    write_frames(tmp_path / "anna_mask", alpha)
    write_frames(tmp_path / "berta_mask", alpha[:1] > 0.9)
    (tmp_path / "clara.mp4").write_text("<html>")
    lines = [
        {"source": "anna", "mask": "anna_mask", "fps": 8},
        {"source": "berta", "mask": "berta_mask/00000.png", "name": "B."},
        {"source": "clara.mp4", "mask": "anna_mask"},
    ]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "backgrounds").mkdir()
    write_video(tmp_path / "backgrounds" / "sea.mp4", Clip(noise(90, 9), 24.0))
    write_video(tmp_path / "backgrounds" / "wood.mp4", Clip(noise(91, 9), 24.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["data", "compose", "--people", "people.jsonl", "--backgrounds", "backgrounds", "--output", "out"]


def test_masks_are_exact_and_the_three_pairs_fit_together(work, capsys):
    assert main([*COMMAND, "--store", "frames"]) == 0
    out, err = capsys.readouterr()
    assert out == "out/pairs.jsonl: 2 done, 1 left out, 6 kept\n"
    assert "clara.mp4 is left out: source 'clara.mp4': is not a video" in err
    entries = read_manifest("out/pairs.jsonl")
    assert [entry.edit for entry in entries] == ["remove", "add", "background"] * 2 and {entry.kind for entry in entries} == {"portrait"}
    assert entries[0].name == "000000-anna-remove" and entries[3].name == "000001-B-remove" and entries[0].fps == 8
    remove, add, background = (load_entry(entry) for entry in entries[:3])
    assert torch.equal(remove.target, add.request.source.frames) and torch.equal(remove.request.source.frames, add.target)
    assert torch.equal(background.target, add.target) and torch.equal(background.request.source.frames, noise(4))
    for pair in (remove, add, background):
        assert torch.equal(pair.request.source.frames[~pair.mask], pair.target[~pair.mask])
        assert (pair.request.source.frames[pair.mask] != pair.target[pair.mask]).any(dim=-1).float().mean() > 0.99
        assert torch.equal(pair.request.reference, pair.target[0])
    assert remove.mask.sum() == 5 * 16 * 17 and (~background.mask).sum() == 5 * 16 * 16  # the soft column is in both
    soft = add.target[2, 8:24, 26]
    assert torch.allclose(soft, (noise(4)[2, 8:24, 26] * 128 + remove.target[2, 8:24, 26] * 127) / 255, atol=0.6 / 255)


def test_it_goes_on_where_it_stopped(work, capsys):
    assert main(COMMAND) == 0
    times = {path: path.stat().st_mtime_ns for path in work.glob("out/0*/*.mp4")}
    assert len(times) == 6
    manifest = (work / "out/pairs.jsonl").read_bytes()
    (work / "out/pairs.jsonl").unlink()
    (work / "out/.000002-clara.1.partial/original").mkdir(parents=True)  # as a kill would leave it
    assert main(COMMAND) == 0
    assert (work / "out/pairs.jsonl").read_bytes() == manifest
    assert {path: path.stat().st_mtime_ns for path in work.glob("out/0*/*.mp4")} == times
    assert not list((work / "out").glob(".*"))
    pair = load_entry(read_manifest("out/pairs.jsonl")[0])
    assert (pair.request.source.frames - pair.target)[~pair.mask].abs().mean() < 0.1 < (pair.request.source.frames - pair.target)[pair.mask].abs().mean()


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_nothing(work):
    """The process itself is killed once two clips are done: what a second run leaves is what one run would have left."""
    lines = [{"source": "anna", "mask": "anna_mask", "name": f"p{i}"} for i in range(30)]
    (work / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*COMMAND, "--store", "frames"]
    process = subprocess.Popen([sys.executable, "-c", f"from mive_core.cli import main; main({command!r})"])
    journal, deadline = work / "out" / "composed.jsonl", time.monotonic() + 120
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = journal.read_bytes().count(b"\n")
    assert 2 <= done < 30
    assert main(command) == 0
    marks = [json.loads(line)["mark"] for line in journal.read_text().splitlines()]
    assert len(marks) == len(set(marks)) == 30
    os.rename("out", "killed")
    assert main(command) == 0
    whole, halves = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "composed.jsonl"}
        for folder in (work / "out", work / "killed")
    )
    assert whole == halves


def test_a_described_background_is_in_the_words(work):
    (work / "places.jsonl").write_text('{"source": "backgrounds/sea.mp4", "instruction": "a stormy sea"}\n')
    assert main([*COMMAND[:4], "--backgrounds", "places.jsonl", "--output", "out"]) == 0
    assert all(("a stormy sea" in entry.instruction) == (entry.edit == "background") for entry in read_manifest("out/pairs.jsonl"))


@pytest.mark.parametrize(
    "line, more, says",
    [
        ({"source": "anna"}, [], "a person's clip has no mask; got anna; name a mask in its line, or a model that finds persons with --segmenter"),
        ({"source": "anna"}, ["--segmenter", "gone"], "segmenter 'gone': no such folder"),
        ({"source": "anna"}, ["--segmenter", "backgrounds"], "is no segmentation model that can be read"),
        (
            {"source": "anna", "mask": "anna_mask"},
            ["--frames", "9"],
            "none of the clips can be used; got 1, the first of which says: source 'anna': the clip is shorter",
        ),
        ({"source": "anna", "mask": "backgrounds/sea.mp4", "masks": "x"}, [], r"people.jsonl:1:"),
        ({"source": "anna", "mask": "short"}, [], "the mask and the person's clip differ in length"),
        ({"source": "anna", "mask": "black"}, [], "there is no person to be cut out; got 0.0% of the pixels"),
    ],
)
def test_what_cannot_be_composed(work, capsys, line, more, says):
    write_frames(work / "short", noise(1, 3))
    write_frames(work / "black", torch.zeros(5, 32, 48, 3))
    (work / "people.jsonl").write_text(json.dumps(line) + "\n")
    assert main([*COMMAND, *more]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
    assert not os.path.isdir("out") or os.listdir("out") in ([], ["composed.jsonl"])


def test_one_colour_over_another():
    front, back = noise(1), noise(2)
    alpha = torch.rand(5, 32, 48, generator=torch.Generator().manual_seed(3)).mul(3).sub(1).clamp(0, 1)
    mixed = over(front, back, alpha)
    assert torch.equal(mixed[alpha == 0], back[alpha == 0]) and torch.equal(mixed[alpha == 1], front[alpha == 1])
    assert torch.allclose(mixed, front * alpha[..., None] + back * (1 - alpha[..., None]), atol=1e-6)


@pytest.fixture
def segmenter(tmp_path):
    """A random SegFormer that knows a wall and a person."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=16, id2label={0: "wall", 1: "Person", 2: "sky"}
    )
    model = SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.weight.mul_(300)
    model.save_pretrained(tmp_path / "segformer")
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "segformer")
    return tmp_path / "segformer"


def test_a_person_is_what_the_model_calls_so(segmenter):
    found = Segmenter.load(segmenter)
    frames = noise(5, 11)
    alpha = found.alpha(frames)
    assert found.label == 1 and alpha.shape == (11, 32, 48) and 0 <= alpha.min() < alpha.max() - 0.2 and alpha.max() <= 1
    pixels = found.processor(images=[(frames[9] * 255).round().to(torch.uint8).numpy()], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        likely = found.model(pixel_values=pixels).logits.softmax(1)[:, 1:2]
    likely = torch.nn.functional.interpolate(likely, (32, 48), mode="bilinear")[0, 0]
    torch.testing.assert_close(alpha[9], ((likely - 0.25) / 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_persons_are_found_where_no_mask_is_given(work, segmenter, capsys):
    (work / "people.jsonl").write_text('{"source": "anna"}\n')
    assert main([*COMMAND, "--segmenter", str(segmenter), "--store", "frames"]) == 0
    pair = load_entry(read_manifest("out/pairs.jsonl")[0])
    assert 0.01 < pair.mask.float().mean() < 1 and torch.equal(pair.request.source.frames[~pair.mask], pair.target[~pair.mask])


def test_a_model_that_knows_no_person(segmenter):
    config = json.loads((segmenter / "config.json").read_text())
    config["id2label"]["1"] = "dog"
    (segmenter / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the model knows no 'person'; got wall, dog, sky"):
        Segmenter.load(segmenter)


def test_pickled_weights_are_not_read(segmenter):
    (segmenter / "model.safetensors").unlink()
    torch.save({}, segmenter / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no segmentation model that can be read"):
        Segmenter.load(segmenter)
