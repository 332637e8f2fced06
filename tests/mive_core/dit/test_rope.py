"""Rotary positions: Wan's for the target, t = -1 for the reference, none for the condition."""

import torch

from mive_core.dit.rope import apply_rotary, axis_dims, rotary_table


def test_condition_tokens_are_not_turned():
    table = rotary_table(5, (2, 3, 4), 32, 10000.0)
    assert table.shape == (1, 5 + 3 * 12, 1, 16)
    assert (table[:, :5] == 1).all()


def test_reference_sits_one_frame_before_the_target():
    head_dim = 32
    rotation = rotary_table(0, (2, 2, 3), head_dim, 10000.0).view(3, 2, 3, head_dim // 2)
    time_pairs = axis_dims(head_dim)[0] // 2
    assert torch.allclose(rotation[0, ..., :time_pairs], rotation[2, ..., :time_pairs].conj(), atol=1e-6)  # -1 against +1
    assert torch.allclose(rotation[0, ..., time_pairs:], rotation[1, ..., time_pairs:])  # the same place
    assert torch.allclose(rotation[1, 0, 0], torch.ones_like(rotation[1, 0, 0]))  # the target starts at the origin


def test_turning_keeps_lengths_and_depends_on_distance_alone():
    table = rotary_table(0, (4, 1, 1), 16, 100.0)
    q = torch.randn(1, 1, 1, 16).expand(1, 5, 1, 16)
    turned = apply_rotary(q, table)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    scores = torch.einsum("blhd,bmhd->lm", turned, turned)
    assert torch.allclose(scores.diagonal(1), scores[0, 1].expand(4), atol=1e-4)
    assert abs(scores[0, 1] - scores[0, 2]) > 1e-3


def test_a_keyframe_is_to_its_frame_what_the_reference_is_to_the_first():
    times = torch.tensor([[0.0, 2.0], [0.0, 3.0]])
    table = rotary_table(1, (4, 1, 1), 16, 100.0, reference_times=times)
    assert table.shape == (2, 1 + 2 + 4, 1, 8)
    alone = rotary_table(1, (4, 1, 1), 16, 100.0)
    assert torch.equal(table[0, [0, 1, 3, 4, 5, 6]], alone[0])
    for row, place in ((0, 2), (1, 3)):  # a keyframe at time 2 or 3 is rotated like target frame 1 or 2
        assert torch.equal(table[row, 2], table[row, 3 + place - 1])
