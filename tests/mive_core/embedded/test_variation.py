"""What training clips vary beyond the held-out ones: words that leave the result open, motion, backgrounds, cuts and keyframes."""

from collections import Counter

import numpy as np
import pytest
import torch

from mive_core.embedded.synthetic import PairedEdits
from mive_core.embedded.synthetic.background import Footage
from mive_core.embedded.synthetic.edit_plan import draw_plan, plan_odds
from mive_core.embedded.synthetic.labels import RGB
from mive_core.embedded.synthetic.random_scenes import clip_times
from mive_core.embedded.synthetic.rendering import render_shots
from mive_core.embedded.synthetic.variation import draw_shots

SIZE, TIMES = (96, 96), clip_times(17, 8.0)


def plans(num, kinds=None, edits=None, seed=3):
    rng, odds = np.random.default_rng(seed), plan_odds("train", kinds, edits)
    return [(rng, draw_plan(rng, odds, False)) for _ in range(num)]


def test_one_look_comes_in_many_strengths_under_the_same_words():
    frames = np.random.default_rng(0).uniform(size=(64, 3)).astype(np.float32)
    changes = []
    for rng, plan in plans(40, ("loose words",), ("look",)):
        look = draw_shots(rng, plan, TIMES, SIZE)[0].scenes.look
        changes.append(float(np.abs(look(frames) - frames).mean()))
        assert look(frames).dtype == np.float32
    assert min(changes) < 0.1 and max(changes) > 0.3


def test_a_new_colour_and_object_are_as_the_reference_shows_them():
    colours, sizes, angles, gaps = [], [], [], []
    for rng, plan in plans(40, ("loose words",), ("replace",)):
        scenes = draw_shots(rng, plan, TIMES, SIZE)[0].scenes
        before, after = (body.motion.track(TIMES, SIZE) for body in (scenes.before, scenes.after))
        assert np.allclose(after - before, (after - before)[:1], atol=1e-6) or not np.allclose(after[:, 2], before[:, 2])
        assert np.ptp((after - before)[:, (0, 1, 3)], axis=0).max() < 1e-6  # moves and turns as the old one
        colours.append(np.linalg.norm(np.subtract(scenes.after.rgb, RGB[plan.labels.new_colour])))
        sizes.append(after[0, 2] / before[0, 2])
        angles.append(after[0, 3])
        gaps.append(np.hypot(*(after - before)[0, :2]))
    assert max(colours) > 0.3 and min(sizes) < 0.75 and max(sizes) > 1.3 and np.std(angles) > 1 and max(gaps) > 4


@pytest.mark.parametrize("split", ("train", "heldout"))
def test_vague_words_name_no_edit_and_wrong_words_another(split):
    for kind in ("vague words", "wrong words"):
        edits = PairedEdits(5, split, size=(32, 32), num_frames=5, kinds=(kind,))
        for index in range(8):
            edit = edits.sample(index)
            text = edit.pair.request.instruction
            assert edit.kind == kind and text and torch.equal(edit.pair.request.reference, edit.pair.target[0])
            if kind == "vague words":
                assert not {edit.labels.new_colour, edit.labels.shape, edit.labels.new_shape} & set(text.split())
    for _, plan in plans(60, ("wrong words",)):
        named, shown = plan.said.labels, plan.labels
        assert (named.edit, named.new_shape, named.new_colour, named.look, named.background) != (
            shown.edit,
            shown.new_shape,
            shown.new_colour,
            shown.look,
            shown.background,
        )


def test_where_nothing_is_asked_the_object_that_words_name_is_absent():
    words = Counter()
    for rng, plan in plans(60, ("nothing asked",)):
        words[plan.words] += 1
        scenes = draw_shots(rng, plan, TIMES, SIZE)[0].scenes
        if plan.said is not None:
            assert (plan.said.labels.shape, plan.said.labels.colour) not in {(body.shape, body.colour) for body in scenes.others}
    assert set(words) == {"keep", "none", "other"}


def test_bodies_turn_resize_and_move_fast_in_step_in_source_and_target():
    turns, growths, speeds = [], [], []
    for rng, plan in plans(120, ("seen in reference",), ("recolour",)):
        scenes = draw_shots(rng, plan, TIMES, SIZE)[0].scenes
        before, after = (body.motion.track(TIMES, SIZE) for body in (scenes.before, scenes.after))
        assert (before == after).all()
        turns.append(abs(before[-1, 3] - before[0, 3]))
        growths.append(before[-1, 2] / before[0, 2])
        speeds.append(np.hypot(*np.diff(before[:, :2], axis=0).T).max())
    assert 0.3 < np.mean(np.array(turns) > 1.5) < 0.6 and max(turns) > 5.5
    assert min(growths) < 0.6 and max(growths) > 1.7 and 5 < max(speeds) < 6.5


def test_a_cut_changes_the_scene_and_keeps_the_edit():
    found = 0
    for rng, plan in plans(400, ("seen in reference", "loose words", "nothing asked")):
        shots = draw_shots(rng, plan, TIMES, SIZE)
        assert sum(len(shot.times) for shot in shots) == len(TIMES)
        if len(shots) == 1:
            continue
        found += 1
        first, second = (shot.scenes for shot in shots)
        assert first.backdrop is not second.backdrop and first.look is second.look
        assert (first.new_backdrop is first.backdrop) == (second.new_backdrop is second.backdrop)
        for old, new in zip((first.before, first.after, *first.others), (second.before, second.after, *second.others), strict=True):
            assert old is new or (old.shape, old.rgb) == (new.shape, new.rgb)
        rendered = render_shots(shots, (32, 32))
        outside = rendered.footprint == 0
        assert rendered.source.shape == (17, 32, 32, 3) and (rendered.source[outside] == rendered.target[outside]).all()
    assert 0.03 < found / 400 < 0.1


def test_two_alike_late_ones_and_footage_have_no_cut():
    footage = Footage(np.zeros((17, 96, 96, 3), np.float32))
    for rng, plan in plans(80, ("two alike", "enters late")):
        assert len(draw_shots(rng, plan, TIMES, SIZE)) == 1
    for rng, plan in plans(80, ("seen in reference",)):
        assert len(draw_shots(rng, plan, TIMES, SIZE, footage)) == 1


def test_many_local_edits_are_over_pictures():
    local = [
        draw_shots(rng, plan, TIMES, SIZE)[0].scenes.backdrop.camera is not None for rng, plan in plans(120, None, ("recolour", "remove", "replace", "add"))
    ]
    assert np.mean(local) > 0.5


def test_keyframes_are_frames_of_their_own_and_only_for_training():
    edits, num = PairedEdits(4, size=(32, 32), num_frames=17), Counter()
    for index in range(150):
        edit = edits.sample(index)
        num[len(edit.keyframes)] += 1
        assert edit.keyframes == tuple(sorted(set(edit.keyframes))) and all(0 < i < 17 for i in edit.keyframes)
    assert edits.sample(3).keyframes == edits.sample(3).keyframes
    assert 0.15 < num[1] / 150 < 0.36 and 0.02 < num[2] / 150 < 0.16
    assert all(PairedEdits(4, "heldout", size=(32, 32), num_frames=5).sample(index).keyframes == () for index in range(12))


def test_the_edited_object_is_where_the_target_shows_it():
    edits = PairedEdits(6, kinds=("loose words",), edits=("replace", "add"))
    for index in range(6):
        edited = edits.sample(index).edited_object
        weight = edited.cover[0]
        if weight.sum() > 100:
            centre = torch.stack([(weight.sum(dim=axis) * (torch.arange(96) + 0.5)).sum() / weight.sum() for axis in (0, 1)])
            assert (centre - edited.track[0, :2]).norm() < 1.2 * edited.track[0, 2]
