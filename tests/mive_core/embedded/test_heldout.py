"""Looks to measure on: strong, and none that training's formula comes near."""

import torch

from mive_core.embedded.heldout import UNSEEN_LOOKS, unseen_look_pairs
from mive_core.embedded.synthetic import PHRASINGS
from mive_core.embedded.synthetic.looks import LOOKS_FN
from mive_core.embedded.synthetic.natural_images import PICTURES, pyramid
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
