"""The drawn clips and paired edits: repeatable, consistent, and split as promised."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from dataclasses import astuple
from functools import cache
from zlib import crc32

import numpy as np
import pytest
import torch

from mive_core.embedded.synthetic import COLOURS, KINDS, LOOKS_FN, PHRASINGS, SHAPES, VOCABULARIES, PairedEdits, apply_look, is_held_out, random_clip
from mive_core.embedded.synthetic.edit_plan import EDIT_ODDS, KIND_ODDS, draw_plan, plan_odds
from mive_core.embedded.synthetic.natural_images import PICTURES, pyramid
from mive_core.embedded.synthetic.phrases import NUM_HELD_OUT, OPEN_PHRASINGS
from mive_core.embedded.synthetic.random_scenes import clip_times
from mive_core.embedded.synthetic.variation import draw_shots
from mive_core.errors import UserError

NUM = 30


@cache
def drawn(split="train"):
    edits = PairedEdits(11, split)
    return [edits.sample(i) for i in range(NUM)]


def digest(split="train", indices=(0, 5, 9)) -> str:
    edits, state = PairedEdits(11, split), hashlib.sha256()
    for index in indices:
        add_to(state, edits.sample(index).pair)
    state.update(random_clip(3).tobytes())
    return state.hexdigest()


def add_to(state, pair) -> None:
    for tensor in (pair.request.source.frames, pair.request.reference, pair.target, pair.mask):
        state.update(tensor.numpy().tobytes())
    state.update(pair.request.instruction.encode())


@cache
def plans(split, num=2000):
    rng, odds = np.random.default_rng(crc32(split.encode())), plan_odds(split, None, None)
    return [draw_plan(rng, odds, split == "heldout") for _ in range(num)]


@pytest.mark.slow
def test_an_index_gives_the_same_edit_in_another_process():
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {__file__!r}); m = u.module_from_spec(s); s.loader.exec_module(m); print(m.digest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == digest() == digest()


@pytest.mark.parametrize(
    ("kinds", "expected"),
    (
        (None, "53f33fda27ad5e1d3bb8e1ec1ace8e9a5021763bdeb3831a5dc57633e5aad97c"),
        (("enters late",), "92ed59a59fa3f41442f8faad7f86ea1dc2476668b280ea82d7cc2c15b0acc11a"),
        (("two alike",), "d06a8582639524d966a651bf75e2e1ceaea52657bf1350826efbe56ad4166bec"),
        (("instruction only",), "f83b13e9f4426d0d8464a433176c68b1973e46c0132c6070e0f7e9d1c72ea3e6"),
        (("no instruction",), "346b9284a556ddf0e7891702d34cd55a8dee66af08d0c6824d966f0b7bc04043"),
    ),
)
def test_held_out_clips_are_the_published_ones(kinds, expected):
    """Every published figure is measured on them, so that a change of what training draws must leave them as they are, bit for bit."""
    edits, state = PairedEdits(7, "heldout", num_frames=9, kinds=kinds), hashlib.sha256()
    for index in range(12 if kinds is None else 3):
        add_to(state, edits.sample(index).pair)
    assert state.hexdigest() == expected


def test_clips_are_float32_within_0_and_1():
    clip = random_clip(1, size=(160, 96), num_frames=9)
    assert clip.shape == (9, 96, 160, 3) and clip.dtype == np.float32
    for edit in drawn():
        pair = edit.pair
        for frames in (pair.request.source.frames, pair.target):
            assert frames.shape == (17, 96, 96, 3) and frames.dtype == torch.float32
            assert 0 <= frames.min() and frames.max() <= 1
        assert pair.request.reference.shape == (96, 96, 3) and pair.mask.shape == (17, 96, 96) and pair.mask.dtype == torch.bool


@pytest.mark.parametrize("split", ("train", "heldout"))
def test_outside_the_mask_source_and_target_are_equal(split):
    for edit in drawn(split):
        pair = edit.pair
        changed = (pair.target != pair.request.source.frames).any(dim=-1)
        assert not (changed & ~pair.mask).any(), pair.name
        assert edit.kind == "nothing asked" or changed[pair.mask].float().mean() > 0.3, pair.name
        assert edit.labels.edit != "look" or pair.mask.all()


@pytest.mark.parametrize("split", ("train", "heldout"))
def test_the_reference_tells_only_where_its_kind_says_so(split):
    for edit in drawn(split):
        pair, kind = edit.pair, edit.labels.kind
        source, target, reference = pair.request.source.frames[0], pair.target[0], pair.request.reference
        if kind in ("seen in reference", "no instruction"):  # loose, vague and wrong words, too
            assert torch.equal(reference, target) and not torch.equal(reference, source)
        else:
            assert torch.equal(reference, source)
        if kind == "enters late":
            assert torch.equal(source, target) and not pair.mask[0].any() and pair.mask[6:].flatten(1).any(dim=1).all()
        if kind == "instruction only":
            assert not torch.equal(source, target)
        if edit.kind == "nothing asked":
            assert torch.equal(pair.target, pair.request.source.frames) and not pair.mask.any() and edit.edited_object is None
        assert (pair.request.instruction == "") == (edit.words == "none")


def test_two_alike_come_late_or_are_in_an_unedited_reference():
    edits = PairedEdits(2, kinds=("two alike",))
    late = []
    for index in range(16):
        edit = edits.sample(index)
        assert edit.labels.pick != "none" and edit.labels.kind == "two alike"
        late.append(torch.equal(edit.pair.request.source.frames[0], edit.pair.target[0]))
    assert any(late) and not all(late)


def test_every_kind_and_edit_can_be_drawn_alone_in_both_splits():
    for split in ("train", "heldout"):
        for kind, odds in EDIT_ODDS.items():
            for edit in odds:
                drawn = PairedEdits(4, split, size=(32, 48), num_frames=5, kinds=(kind,), edits=(edit,)).sample(0)
                assert (drawn.kind, drawn.labels.edit) == (kind, edit)
                drawn.labels.indices()  # all labels are words of the VLM's vocabularies


def test_the_smallest_of_two_alike_is_drawn_in_a_wide_frame_too():
    """Areas were once measured against the whole frame, so that a small star in a wide one was redrawn for ever."""
    edits = PairedEdits(6, size=(192, 64), num_frames=5, kinds=("two alike",))
    assert {edits.sample(i).labels.pick for i in range(20)} >= {"smaller", "larger"}


def test_the_mixture_is_as_published():
    for split in ("train", "heldout"):
        kinds, edits = Counter(p.kind for p in plans(split)), Counter(p.labels.edit for p in plans(split))
        assert set(kinds) == set(KIND_ODDS[split]) and abs(sum(KIND_ODDS[split].values()) - 1) < 1e-9
        for kind, share in KIND_ODDS[split].items():
            assert abs(kinds[kind] / 2000 - share) < 0.035
        (fewest, most), (rare, common) = {"train": ((0.12, 0.22), (0.26, 0.38)), "heldout": ((0.16, 0.26), (0.12, 0.22))}[split]
        assert fewest < edits["look"] / 2000 < most and 0.04 < edits["background"] / 2000 < 0.14
        assert rare < edits["replace"] / 2000 < common
        blind = kinds["enters late"] + kinds["two alike"] + kinds["instruction only"]
        low, high = {"train": (0.40, 0.48), "heldout": (0.31, 0.39)}[split]
        assert low < blind / 2000 < high
    assert sum(p.words != "exact" for p in plans("train")) > 0.36 * 2000 and all(p.varied for p in plans("train"))
    assert {p.words for p in plans("heldout")} == {"exact", "none"} and not any(p.varied for p in plans("heldout"))


def test_the_target_moves_in_no_way_that_the_inputs_hide():
    """Added bodies and new backgrounds once drifted at a speed that neither the source nor the reference's one frame could tell."""
    size, times = (64, 64), clip_times(17, 8.0)
    rng = np.random.default_rng(8)
    for edit in ("add", "background", "replace"):
        for _ in range(20):
            plan = draw_plan(rng, plan_odds("train", ("seen in reference", "no instruction", "loose words", "vague words"), (edit,)), False)
            cast = draw_shots(rng, plan, times, size)[0].scenes
            if edit == "background":
                frames = cast.new_backdrop.render(times, size)
                assert (frames == frames[:1]).all()
            elif edit == "add" or plan.labels.shape in ("circle", "ring"):
                track = cast.after.motion.track(times, size)
                assert (track[:, 3] == track[0, 3]).all() and (edit == "replace" or (track == track[:1]).all())


def test_a_new_shape_that_only_words_tell_is_upright_and_plain():
    size, times = (64, 64), clip_times(17, 8.0)
    rng = np.random.default_rng(9)
    for kind in ("enters late", "two alike", "instruction only"):
        for _ in range(10):
            cast = draw_shots(rng, draw_plan(rng, plan_odds("train", (kind,), ("replace",)), False), times, size)[0].scenes
            before, after = (body.motion.track(times, size) for body in (cast.before, cast.after))
            assert (after[:, 3] == 0).all() and cast.after.texture.pattern == "plain"
            assert (before[:, :3] == after[:, :3]).all() and (before[:, 3].all() or cast.before.shape in ("circle", "ring"))


def test_held_out_combinations_are_never_trained_on():
    trained = set().union(*(p.labels.combinations() for p in plans("train")))
    assert trained and not any(is_held_out(c) for c in trained)
    for plan in plans("heldout"):
        combinations = plan.labels.combinations()
        assert not combinations or combinations - trained
    for edit in ("recolour", "replace", "remove", "add"):
        num = sum(is_held_out((edit, s, c)) for s in SHAPES[1:] for c in COLOURS[1:])
        assert 5 <= num <= 8  # of 54


def test_each_edit_has_five_phrasings_to_train_on_and_others_to_measure_on():
    assert {"recolour", "replace", "remove", "add", "background", "look"} <= set(PHRASINGS)
    for phrasings in (*PHRASINGS.values(), *OPEN_PHRASINGS.values()):
        assert NUM_HELD_OUT >= 1 and len(set(phrasings)) == len(phrasings) >= 5 + NUM_HELD_OUT


def test_held_out_phrasings_use_no_word_that_training_never_has():
    """A model that learns language from these sentences alone can understand a new sentence, not a new word."""
    words = lambda phrasings: set(re.findall(r"[a-z]+", " ".join(phrasings)))
    lists = (*PHRASINGS.values(), *OPEN_PHRASINGS.values())
    trained = words(phrasing for phrasings in lists for phrasing in phrasings[:-NUM_HELD_OUT])
    assert not words(phrasing for phrasings in lists for phrasing in phrasings[-NUM_HELD_OUT:]) - trained


def test_what_is_said_without_pictures_is_labelled_as_in_a_drawn_edit():
    edits = PairedEdits(8, kinds=KINDS[1:])
    said = [edits.sample_instruction(i) for i in range(60)]
    assert said == [edits.sample_instruction(i) for i in range(60)]
    assert {labels.kind for _, labels in said} >= {"seen in reference", "enters late", "two alike", "instruction only"}
    for text, labels in said:
        if labels.kind == "no instruction":
            assert text == ""
        elif labels.edit == "recolour":
            assert labels.new_colour in text
        elif labels.edit in ("add", "replace"):
            assert labels.new_shape in text


def test_instructions_are_short_lower_case_english():
    for edit in (*drawn(), *drawn("heldout")):
        text = edit.pair.request.instruction
        assert text == text.lower() and "{" not in text and "none" not in text and "a orange" not in text and "  " not in text
        assert text == "" or 2 <= len(text.split()) <= 24, text


def test_labels_are_words_of_the_vocabularies():
    assert all(words[0] == "none" for words in VOCABULARIES.values())
    for edit in drawn():
        words = [v[i] for v, i in zip(VOCABULARIES.values(), edit.labels.indices())]
        assert tuple(words) == astuple(edit.labels)
        assert (edit.labels.place != "none") == (edit.labels.edit not in ("none", "look", "background"))


def test_looks_are_strong():
    pictures = [pyramid(name)[1] for name in ("cup", "portrait", "cat", "rocket", "garage", "tissue")]
    frames = torch.from_numpy(np.concatenate([p.reshape(-1, 3) for p in pictures])).float() / 255
    decibels = {}
    for name in LOOKS_FN:
        looked = apply_look(name, frames)
        assert looked.dtype == torch.float32 and 0 <= looked.min() and looked.max() <= 1
        decibels[name] = -10 * float(torch.log10((looked - frames).pow(2).mean()))
    assert max(decibels.values()) < 20
    assert sum(value < 15 for value in decibels.values()) >= 0.7 * len(decibels), decibels


def test_pictures_come_with_the_package():
    for name in PICTURES:
        assert pyramid(name)[0].dtype == np.uint8 and pyramid(name)[0].shape[2] == 3


@pytest.mark.parametrize("bad", ({"split": "test"}, {"size": (100, 96)}, {"num_frames": 16}, {"num_frames": 1}, {"kinds": ("two alike",), "edits": ("look",)}))
def test_what_does_not_exist_is_refused(bad):
    with pytest.raises(UserError):
        PairedEdits(0, **bad)


def test_an_unknown_look_is_refused():
    with pytest.raises(UserError, match="unknown look"):
        apply_look("sparkling", torch.zeros(1, 2, 2, 3))
