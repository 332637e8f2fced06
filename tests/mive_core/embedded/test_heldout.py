"""Looks to measure on: strong, and none that training's formula comes near; drawn objects over footage."""

import json

import pytest
import torch

from mive_core.cli import main
from mive_core.embedded.heldout import STRENGTHS, UNSEEN_LOOKS, look_strength_pairs, object_pairs, unseen_look_pairs
from mive_core.embedded.synthetic import PHRASINGS
from mive_core.embedded.synthetic.looks import LOOKS_FN
from mive_core.embedded.synthetic.natural_images import PICTURES, pyramid
from mive_core.errors import UserError
from mive_core.media.images import write_frames
from mive_core.media.video import read_clip
from mive_core.types import Clip


def pixels():
    pictures = [torch.from_numpy(pyramid(name)[1]).flatten(0, 1)[::7] for name in PICTURES]
    return (torch.cat(pictures).float() / 255).clamp(0, 1)


def test_unseen_looks_are_strong_and_unlike_each_named_one():
    colours = pixels()
    known = [torch.from_numpy(look(colours.numpy())) for look in LOOKS_FN.values()]
    for name, look in UNSEEN_LOOKS.items():
        looked = look(colours).clamp(0, 1)
        assert looked.shape == colours.shape and looked.isfinite().all()
        assert (looked - colours).square().mean().sqrt() > 0.08, name
        nearest = min((looked - other).square().mean().sqrt() for other in known)
        assert nearest > 0.07, (name, nearest)


def test_half_of_them_are_no_linear_mix_of_the_channels():
    """What training draws is a mix of the channels after a bend of at most a square: the best fit by it leaves something of these."""
    colours = pixels()
    terms = torch.cat([colours, colours * (1 - colours), torch.ones(len(colours), 1)], dim=1)
    left = {}
    for name, look in UNSEEN_LOOKS.items():
        looked = look(colours).clamp(0, 1)
        fitted = terms @ torch.linalg.lstsq(terms, looked).solution
        left[name] = (fitted.clamp(0, 1) - looked).square().mean().sqrt().item()
    assert sum(value > 0.03 for value in left.values()) >= 4, left


def test_their_words_only_point_at_the_reference():
    clip = Clip(torch.rand(5, 16, 16, 3), 8.0)
    pairs = [pair for pair, _ in unseen_look_pairs(clip)]
    assert len(pairs) == len(UNSEEN_LOOKS) and all(torch.equal(pair.request.reference, pair.target[0]) for pair in pairs)
    assert {pair.request.instruction for pair in pairs} == set(PHRASINGS["match"][-2:])
    assert all(pair.target.min() >= 0 and pair.target.max() <= 1 for pair in pairs)


def test_strengths_lead_from_the_source_to_the_look():
    clip = Clip(torch.rand(5, 16, 16, 3, generator=torch.Generator().manual_seed(0)), 8.0)
    pairs = list(look_strength_pairs(clip))
    assert len(pairs) == len(UNSEEN_LOOKS) * len(STRENGTHS) and {labels["kind"] for _, labels in pairs} == {"look strengths"}
    named = {pair.name: pair for pair, _ in pairs}
    assert len(named) == len(pairs)
    looks = {pair.name: pair for pair, _ in unseen_look_pairs(clip)}
    for name, look in looks.items():
        strengths = [named[f"{name}-{percent}"] for percent in (25, 50, 75, 100)]
        assert {pair.request.instruction for pair in strengths} == {look.request.instruction}
        assert all(torch.equal(pair.request.reference, pair.target[0]) for pair in strengths)
        for pair, strength in zip(strengths, STRENGTHS):
            assert torch.allclose(pair.target, clip.frames + strength * (look.target - clip.frames), atol=1e-6)


def test_objects_move_over_the_footage():
    footage = torch.rand(9, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    pairs = list(object_pairs(footage, 6, seed=3, num_frames=5))
    starts = set()
    for pair, labels in pairs:
        assert labels["kind"] == "objects over footage" and labels["edit"] in ("recolour", "remove", "replace")
        source, target = pair.request.source.frames, pair.target
        assert torch.equal(source[~pair.mask], target[~pair.mask]) and torch.equal(pair.request.reference, target[0])
        shown = [(torch.isclose(source, footage[start : start + 5]).all(dim=-1)).float().mean().item() for start in range(5)]
        assert max(shown) > 0.4  # the rest is objects
        starts.add(shown.index(max(shown)))
    assert len(starts) > 2 and {pair.name for pair, _ in pairs} == {f"objects-3-{i}" for i in range(6)}
    again = [pair for pair, _ in object_pairs(footage, 2, seed=3, num_frames=5)]
    assert torch.equal(again[1].target, pairs[1][0].target)
    with pytest.raises(UserError, match="the footage is shorter than the pairs; got 9 frames; expected 13"):
        list(object_pairs(footage, 1, num_frames=13))


def test_their_commands(tmp_path, capsys):
    write_frames(tmp_path / "frames", torch.rand(7, 40, 60, 3, generator=torch.Generator().manual_seed(0)))
    common = ["--source", str(tmp_path / "frames"), "--frames", "5"]
    assert main(["data", "objects", *common, "--output", str(tmp_path / "objects"), "--num", "2", "--size", "48x32", "--seed", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "objects" / "pairs.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["objects-1-0", "objects-1-1"] and all("colour" in line for line in lines)
    assert read_clip(tmp_path / "objects" / lines[0]["target"]).frames.shape == (5, 32, 48, 3)
    assert main(["data", "strengths", *common, "--output", str(tmp_path / "strengths"), "--size", "48x32"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "strengths" / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and lines[13]["name"] == "unseen-duotone-50" and lines[13]["edit"] == "duotone"
    capsys.readouterr()
    assert main(["data", "objects", *common, "--output", str(tmp_path / "other"), "--size", "50x32"]) == 2
    assert "multiples of 16" in capsys.readouterr().err and not (tmp_path / "other").exists()
