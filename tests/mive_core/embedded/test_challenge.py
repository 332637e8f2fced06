"""The challenge set: apart from training's generator, deterministic, and every pair what its kind says."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mive_core.cli import main
from mive_core.embedded import challenge, synthetic
from mive_core.embedded.challenge import KINDS, ChallengePairs, pairs
from mive_core.embedded.challenge.backdrops import draw_backdrop
from mive_core.embedded.challenge.instructions import PICKS, SENTENCES
from mive_core.embedded.challenge.looks import LOOKS, STRENGTHS, apply_look
from mive_core.embedded.challenge.motion import SPEEDS, draw_track, enter
from mive_core.embedded.challenge.outlines import OUTLINES, coverage
from mive_core.embedded.challenge.pairs import KIND_EDITS, OBJECT_EDITS, RGB
from mive_core.embedded.synthetic.labels import RGB as TRAINED_RGB
from mive_core.embedded.synthetic.shapes import DISTANCES
from mive_core.errors import UserError
from mive_core.media.images import write_frames
from mive_core.media.video import read_clip

SIZE, NUM_FRAMES = (80, 64), 9


@pytest.fixture(scope="module")
def samples():
    pairs = ChallengePairs(5, SIZE, NUM_FRAMES)
    return list(pairs.pairs(len(pairs.turns)))


def test_nothing_is_shared_with_the_trainings_generator():
    for module in Path(challenge.__file__).parent.glob("*.py"):
        names = [node.module or "" for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any("synthetic" in name or "heldout" in name for name in names), module
    assert set(OUTLINES) == set(DISTANCES) and set(RGB) == set(TRAINED_RGB)  # the names, which the VLM knows
    assert not set(RGB.values()) & set(TRAINED_RGB.values())


def test_no_sentence_is_one_of_trainings():
    def form(sentence: str) -> str:
        return re.sub(r"\{\w+\}", "_", sentence.replace("the {it_bare}", "{it}")).lower()

    modules = [ast.parse(path.read_text()) for path in Path(synthetic.__file__).parent.glob("*.py")]
    trained = {form(node.value) for module in modules for node in ast.walk(module) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert form("remove {it} from the video") in trained
    assert not (trained & {form(sentence) for sentences in SENTENCES.values() for sentence in sentences if sentence})


def test_pairs_depend_on_seed_and_index_alone(samples):
    again, label = ChallengePairs(5, SIZE, NUM_FRAMES).sample(9)
    assert torch.equal(again.target, samples[9][0].target) and again.request.instruction == samples[9][0].request.instruction and label == samples[9][1]
    assert not torch.equal(ChallengePairs(6, SIZE, NUM_FRAMES).sample(9)[0].target, again.target)


def test_every_kind_and_edit_takes_its_turn(samples):
    found = {(labels["kind"], labels["edit"]) for _, labels in samples if labels["kind"] != "look strengths"}
    assert found == {(kind, edit) for kind, edits in KIND_EDITS.items() if kind != "look strengths" for edit in edits}
    assert len({pair.name for pair, _ in samples}) == len(samples)


def test_what_each_pair_shows(samples):
    for pair, labels in samples:
        source, target, kind, edit = pair.request.source.frames, pair.target, labels["kind"], labels["edit"]
        assert source.shape == target.shape == (NUM_FRAMES, SIZE[1], SIZE[0], 3) and 0 <= source.min() and target.max() <= 1
        assert torch.equal(pair.request.reference, source[0] if kind == "words alone" else target[0])
        assert (pair.colour is not None) == (edit in OBJECT_EDITS)
        if edit in (*LOOKS, "look"):
            assert pair.mask is None
            continue
        assert torch.equal(source[~pair.mask], target[~pair.mask])
        shown = torch.equal(source[0], target[0])
        assert shown == (kind in ("enters late", "nothing asked"))
        assert torch.equal(source, target) == (kind == "nothing asked")
        if kind == "two alike":
            assert any(pick.split("{thing}")[1].strip() in pair.request.instruction for pick in PICKS.values())


def test_an_absent_object_is_in_no_frame():
    pairs = ChallengePairs(2, SIZE, 5, edits=("absent",))
    for index in range(5):
        pair, _ = pairs.sample(index)
        words = set(re.findall(r"\w+", pair.request.instruction.lower()))
        assert words & set(RGB) and words & set(OUTLINES) and torch.equal(pair.target, pair.request.source.frames)


def test_look_strengths_differ_in_the_reference_alone(samples):
    group = [pair for pair, labels in samples if labels["kind"] == "look strengths"]
    assert len(group) == len(STRENGTHS) and len({pair.request.instruction for pair in group}) == 1
    assert all(torch.equal(pair.request.source.frames, group[0].request.source.frames) for pair in group)
    distances = [(pair.target - pair.request.source.frames).square().mean().item() for pair in group]
    assert distances == sorted(distances) and distances[0] > 0


def test_looks_begin_at_the_source():
    pixels = np.random.default_rng(0).uniform(size=(50, 3)).astype(np.float32)
    for look in LOOKS:
        assert np.allclose(apply_look(look, 0.0, pixels), pixels, atol=1e-5)
        assert np.abs(apply_look(look, 1.0, pixels) - pixels).mean() > 0.05


def test_objects_are_fast_turn_grow_and_cross():
    rng = np.random.default_rng(1)
    speeds = []
    for _ in range(30):
        track = draw_track(rng, SIZE, NUM_FRAMES)
        other = draw_track(rng, SIZE, NUM_FRAMES, meets=track)
        assert np.allclose(track[NUM_FRAMES // 2, :2], other[NUM_FRAMES // 2, :2])
        steps = np.diff(track, axis=0)
        speeds.append(np.hypot(steps[:, 0], steps[:, 1]).max())
        assert np.ptp(track[:, 3]) > 0.3
        late = enter(track, "left", SIZE)
        assert late[0, 0] + 1.3 * late[0, 2] < 0 and np.array_equal(late[-1], track[-1])
    assert 4 < max(speeds) <= SPEEDS[1] and min(speeds) > 1


def test_outlines_are_antialiased_and_turn():
    track = np.array([[20.0, 16.0, 10.0, 0.0], [20.0, 16.0, 10.0, 0.4]])
    for name, outline in OUTLINES.items():
        cover = coverage(outline, track, (40, 32))
        assert cover.shape == (2, 32, 40) and cover.dtype == np.float32 and ((cover > 0.1) & (cover < 0.9)).any()
        centre = np.argwhere(cover[0] > 0.5).mean(axis=0)
        assert np.abs(centre - (15.5, 19.5)).max() < 2.6
        assert (cover[0, 16, 20] > 0.9) == (name != "ring")
        assert np.abs(cover[0] - cover[1]).max() > (0 if name in ("circle", "ring") else 0.5)


def test_footage_stands_behind_the_objects():
    footage = torch.rand(9, 64, 80, 3, generator=torch.Generator().manual_seed(0))
    pair, _ = ChallengePairs(0, SIZE, 5, footage=footage).sample(0)
    shown = [(pair.request.source.frames == footage[start : start + 5]).all(dim=-1).float().mean().item() for start in range(5)]
    assert max(shown) > 0.3
    backdrop = draw_backdrop(np.random.default_rng(0), SIZE, 5)
    assert backdrop.shape == (5, 64, 80, 3) and not np.array_equal(backdrop[0], backdrop[4])
    with pytest.raises(UserError, match="the footage is shorter than the pairs; got 9 frames; expected 13"):
        ChallengePairs(0, SIZE, 13, footage=footage)


def test_the_command(tmp_path, capsys):
    write_frames(tmp_path / "frames", torch.rand(7, 40, 60, 3, generator=torch.Generator().manual_seed(0)))
    common = ["data", "challenge", "--size", "48x32", "--frames", "5", "--num", "2"]
    output = tmp_path / "set"
    assert main([*common, "--output", str(output), "--kind", "nothing asked", "--kind", "two alike", "--edit", "absent", "--edit", "remove"]) == 0
    lines = [json.loads(line) for line in (output / "pairs.jsonl").read_text().splitlines()]
    assert [(line["name"], line["kind"], line["edit"]) for line in lines] == [
        ("challenge-0-0", "nothing asked", "absent"),
        ("challenge-0-1", "two alike", "remove"),
    ]
    assert "colour" in lines[1] and read_clip(output / lines[1]["mask"]).frames.shape == (5, 32, 48, 3)
    assert main([*common, "--output", str(tmp_path / "over"), "--source", str(tmp_path / "frames")]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["--kind", "two alike", "--edit", "look"], "no pair is of these kinds and edits"),
        (["--size", "50x32"], "multiples of 16"),
        (["--frames", "6"], "4n+1"),
    ):
        assert main([*common, *arguments, "--output", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert all(f'"{kind}"' in _help(capsys) for kind in KINDS)


def _help(capsys) -> str:
    with pytest.raises(SystemExit):
        main(["data", "challenge", "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_clip_that_cannot_be_drawn_is_refused(monkeypatch):
    """In nine frames of 192x192 bodies that cross are never apart at first: it went on drawing for ever."""
    monkeypatch.setattr(pairs, "MAX_CANDIDATES", 3)
    with pytest.raises(UserError, match="no clip of the kind 'two alike' and the edit 'recolour' can be drawn so; got 9 frames of 192x192; take more frames"):
        ChallengePairs(5, (192, 192), 9).sample(2)
