"""The share of attention by block: against the whole attention matrix, without any change of the DiT's result."""

import json
from dataclasses import replace

import pytest
import torch

from mive_core.attention import CheckedAttention, torch_attention
from mive_core.cli import main
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.evaluation.attention_picture import draw_attention
from mive_core.evaluation.attention_share import by_layer, by_type, layer_shares, layer_terms, mean_by_block, record_attention, rows_of
from mive_core.media.images import write_image
from mive_core.media.video import write_video
from mive_core.types import Clip

CONFIG = replace(PRESETS["tiny"], num_blocks=3)
TYPES = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 2]])
NUM_REFERENCE, NUM_TARGET = 2 * 24, 3 * 24


@pytest.fixture(scope="module")
def dit() -> MiVEDiT:
    torch.manual_seed(0)
    dit = MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(std=0.08)
    return dit


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return torch.randn(2, 2, 9, 128, generator=torch.Generator().manual_seed(1))


def arguments(dit, states) -> tuple:
    generator = torch.Generator().manual_seed(2)
    noisy, source, reference = (torch.randn(2, 16, frames, 4, 6, generator=generator) for frames in (3, 3, 2))
    return noisy, source, reference, dit.embed_condition(states), torch.tensor([0.7, 0.2]), torch.tensor([[0.0, 1.5]]).expand(2, -1)


def test_the_result_stays_the_same_and_nothing_is_left_behind(dit, states):
    given = arguments(dit, states)
    before = dit(*given)
    with record_attention(dit) as found:
        assert torch.equal(dit(*given), before)
    assert len(found) == 3 and all(block.self_attn.attention is torch_attention for block in dit.blocks)
    assert not dit._forward_pre_hooks and not any(block._forward_pre_hooks for block in dit.blocks)
    dit(*given)
    assert len(found) == 3


def test_a_failed_pass_leaves_nothing_behind(dit, states):
    with pytest.raises(RuntimeError), record_attention(dit):
        dit(*arguments(dit, states)[:3], torch.zeros(2, 9, 7), torch.tensor([0.7, 0.2]))
    assert all(block.self_attn.attention is torch_attention for block in dit.blocks) and not dit._forward_pre_hooks


def test_shares_are_those_of_the_whole_matrix(dit, states):
    """Every target token as a row, and the attention matrix of one block from its own queries, keys and values."""
    seen = []

    def spy(q, k, v, heads, mask=None, **kwargs):
        seen.append((q.clone(), k.clone(), v.clone()))
        return torch_attention(q, k, v, heads, mask, **kwargs)

    for block in dit.blocks:
        block.self_attn.attention = spy
    try:
        with record_attention(dit, num_rows=10**6) as found:
            dit(*arguments(dit, states))
    finally:
        for block in dit.blocks:
            block.self_attn.attention = torch_attention
    assert len(seen) == 3 and [one.block for one in found] == [0, 1, 2]
    for one, (q, k, v) in zip(found, seen, strict=True):
        q, k, v = (x.unflatten(-1, (4, 64)).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / 8).softmax(dim=-1)[:, :, 9 + NUM_REFERENCE :]
        weighted = (weights * v.norm(dim=-1)[:, :, None]).sum(dim=1)
        for share, matrix in ((one.mass, weights.mean(dim=1)), (one.weighted, weighted / weighted.sum(dim=-1, keepdim=True))):
            expected = matrix.mean(dim=1)
            torch.testing.assert_close(share.condition, expected[:, :9])
            torch.testing.assert_close(share.reference, expected[:, 9 : 9 + NUM_REFERENCE].sum(dim=1))
            torch.testing.assert_close(share.target, expected[:, 9 + NUM_REFERENCE :].sum(dim=1))
        assert (one.mass.condition - one.weighted.condition).abs().max() > 1e-4
        assert torch.equal(one.t, torch.tensor([0.7, 0.2]))


def test_chosen_rows_are_the_targets_own(dit, states):
    with record_attention(dit, rows=[5]) as one, record_attention(dit, rows=[5]) as again, record_attention(dit, rows=[6]) as other:
        dit(*arguments(dit, states))
    assert torch.equal(one[0].mass.condition, again[0].mass.condition) and not torch.equal(one[0].mass.condition, other[0].mass.condition)


def test_a_mask_of_the_attention_counts(dit, states):
    """What no query may see has no share."""
    hidden = torch.zeros(1, 1, 1, 9 + NUM_REFERENCE + NUM_TARGET).index_fill(-1, torch.arange(9), -torch.inf)
    with record_attention(dit) as found:
        dit(*arguments(dit, states), mask=hidden)
    assert all(one.mass.condition.sum() == 0 and one.mass.target.min() > 0 for one in found)


def test_a_checked_attention_is_wrapped_like_any_other(states):
    torch.manual_seed(0)
    dit = MiVEDiT(CONFIG, operations=torch.nn, attention=CheckedAttention(torch_attention, "any")).requires_grad_(False)
    with record_attention(dit, num_rows=4) as found:
        dit(*arguments(dit, states))
    assert len(found) == 3


def test_the_terms_of_the_layers_add_up_to_the_condition_tokens(dit, states):
    terms = layer_terms(dit.context, states)
    torch.testing.assert_close(terms.sum(dim=1) + dit.context.fuse.bias, dit.embed_condition(states), atol=1e-5, rtol=1e-5)
    shares = layer_shares(dit.context, states)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 9))
    torch.testing.assert_close(shares[:, 0], terms[:, 0].norm(dim=-1) / (terms[:, 0].norm(dim=-1) + terms[:, 1].norm(dim=-1)))


def test_a_layer_that_adds_nothing_has_no_share(dit, states):
    silent = MiVEDiT(CONFIG, operations=torch.nn, attention=torch_attention).requires_grad_(False)
    silent.load_state_dict(dit.state_dict())
    silent.context.fuse.weight[:, :128] = 0
    shares = layer_shares(silent.context, states)
    assert shares[:, 0].max() == 0 and shares[:, 1].min() == 1


def test_the_splits_add_up_to_the_condition(dit, states):
    with record_attention(dit) as found:
        dit(*arguments(dit, states))
    layers = layer_shares(dit.context, states)
    for one in found:
        torch.testing.assert_close(by_layer(one.mass, layers).sum(dim=1), one.mass.condition.sum(dim=1))
        types = by_type(one.mass, TYPES)
        torch.testing.assert_close(sum(types.values()), one.mass.condition.sum(dim=1))
        torch.testing.assert_close(types["image"], one.mass.condition[:, 2:5].sum(dim=1))
    assert torch.allclose(found[0].origin, torch.ones(2)) and found[2].origin.max() < 0.999


def test_rows_means_and_picture(dit, states):
    with record_attention(dit) as found:
        dit(*arguments(dit, states))
        dit(*arguments(dit, states))
    rows = rows_of(found, (1, 4), layer_shares(dit.context, states), TYPES)
    assert [row["block"] for row in rows] == [0, 1, 2, 0, 1, 2] and rows[0]["t"] == pytest.approx(0.45)
    for row in rows:
        for measure in ("mass", "weighted"):
            figures = row[measure]
            assert figures["condition"] + figures["reference"] + figures["target"] == pytest.approx(1, abs=1e-5)
            assert sum(figures["condition_by_layer"].values()) == pytest.approx(figures["condition"], abs=1e-6)
    means = mean_by_block(rows, "mass")
    assert len(means) == 3 and means[1]["target"] == pytest.approx(rows[1]["mass"]["target"], abs=1e-6)
    picture = draw_attention(rows)
    bar = [picture.getpixel((250, y)) for y in range(58, 314)]
    assert abs(bar.count((200, 204, 198)) / 256 - means[0]["target"]) < 0.02


@pytest.fixture
def files(tmp_path):
    frames = torch.rand(9, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "clip.mp4", Clip(frames, 8.0))
    write_image(tmp_path / "reference.png", frames[0])
    return tmp_path


def inspect(files, *options: str) -> int:
    return main(["inspect", "attention", "--source", f"{files}/clip.mp4", "--reference", f"{files}/reference.png", "--instruction", "make it night",
                 "--output", f"{files}/out", "--steps", "2", *options])  # fmt: skip


def test_the_command_writes_figures_by_block_and_step(files, capsys):
    assert inspect(files) == 0
    report = json.loads((files / "out" / "attention.json").read_text())
    assert len(report["blocks"]) == 2 * 12 and report["blocks"][0]["t"] == 1.0 and report["blocks"][-1]["t"] < 1
    assert report["tokens"]["reference"] == 24 and report["tokens"]["target"] == 3 * 24
    assert report["blocks"][0]["mass"]["condition_by_layer"].keys() == {"1", "4"}
    assert (files / "out" / "attention.png").exists() and "layer 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said", [(["--layers", "1,99"], "no layer 99"), (["--rows", "0"], "expected 1 or more"), (["--layers", "1"], "that many layers")]
)
def test_bad_input_is_one_line_and_writes_nothing(files, capsys, options, said):
    assert inspect(files, *options) == 2
    error = capsys.readouterr().err
    assert said in error and not (files / "out").exists()
