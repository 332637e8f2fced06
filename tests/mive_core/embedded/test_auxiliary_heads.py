"""What a DiT is told about the edited thing: the right facts, at the right tokens, and it learns them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mive_core.embedded.auxiliary_heads import patchify_cover, place_in_patches
from mive_core.embedded.dit_task import FeatureBatches, check_auxiliary
from mive_core.embedded.features import Bucket, compute, object_of, shards_of
from mive_core.embedded.synthetic import SHAPES, PairedEdits
from mive_core.errors import UserError
from mive_core.formats.checkpoint import load_dit
from mive_core.train.loop import run
from mive_core.train.objective import masked_mean

from ..embedded.test_dit_task import CONFIG, features, make_task


def clip(index, **restricted):
    return PairedEdits(3, "train", (64, 64), 9, **restricted).sample(index)


def told(seed, has_thing=True):
    generator = torch.Generator().manual_seed(seed)
    shape, cover = torch.tensor(1 + seed % 6), (torch.rand(2, 8, 8, generator=generator) > 0.5).float()
    if not has_thing:
        return replace(features(5, seed), track=torch.zeros(2, 3), shape=torch.tensor(-1), cover=torch.zeros(2, 8, 8))
    return replace(features(5, seed), track=torch.rand(2, 3, generator=generator) + 1.5, shape=shape, cover=cover)


def supervised(folder, entries, **changes):
    task = make_task(folder, **({"auxiliary_weight": 1.0, "auxiliary_blocks": [0, 0], "num_steps": 60, "learning_rate": 1e-2} | changes))
    task.dataset = FeatureBatches([(Bucket((32, 32), 5, len(entries), 1.0), entries)], task.recipe.batch_size, task.recipe.seed)
    return task


@pytest.mark.parametrize("edit", ["recolour", "replace", "remove", "add"])
def test_a_thing_is_where_the_target_differs_and_as_large(edit):
    for index in range(4):
        sample = clip(index, kinds=("seen in reference",), edits=(edit,))
        thing = sample.edited_object
        assert thing.shape == sample.labels.new_shape
        changed = sample.pair.mask
        for frame in range(0, 9, 4):
            x, y, radius = thing.track[frame].tolist()
            rows, columns = changed[frame].nonzero().float().unbind(1)
            assert abs(rows.mean() - y) < radius and abs(columns.mean() - x) < radius
        assert not thing.cover[~changed].any()
        assert (thing.cover.sum() == 0) == (edit == "remove")


def test_looks_and_backgrounds_have_no_thing():
    for edit in ("look", "background"):
        found = object_of(clip(0, kinds=("seen in reference",), edits=(edit,)))
        assert found["shape"] == -1 and not found["track"].any() and not found["cover"].any()
        assert found["track"].shape == (3, 3) and found["cover"].shape == (3, 16, 16)


def test_what_is_told_is_the_mean_over_a_latent_frame():
    sample = clip(1, kinds=("seen in reference",), edits=("replace",))
    found, thing = object_of(sample), sample.edited_object
    torch.testing.assert_close(found["track"][0], thing.track[0] / 8)
    torch.testing.assert_close(found["track"][2], thing.track[5:9].mean(dim=0) / 8)
    torch.testing.assert_close(found["cover"][1, 3, 5].float(), thing.cover[1:5, 12:16, 20:24].mean(), atol=1e-3, rtol=1e-3)
    assert SHAPES[int(found["shape"])] == thing.shape


def test_offsets_point_from_each_patch_to_the_thing():
    track = torch.tensor([[[5.0, 3.0, 2.0]]])  # cells; patches of two, so it stands in the middle of column 2, row 1
    offset, radius = place_in_patches(track, (1, 2, 2), [1, 4, 4])
    assert offset[0, 0, 1, 2].tolist() == [0.0, 0.0] and offset[0, 0, 0, 0].tolist() == [1.0, 2.0] and offset[0, 0, 3, 3].tolist() == [-2.0, -1.0]
    assert (radius == 1.0).all() and radius.shape == (1, 1, 4, 4)


def test_fine_cover_keeps_rows_and_columns():
    cover = torch.arange(64.0).view(1, 1, 8, 8)
    fine = patchify_cover(cover, 4)
    assert fine.shape == (1, 1, 2, 2, 16)
    assert torch.equal(fine[0, 0, 1, 0].view(4, 4), cover[0, 0, 4:, :4])


def test_a_mean_over_nothing_is_nothing():
    assert masked_mean(torch.zeros(3), torch.ones(3)) == 0
    assert masked_mean(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2.0, 9.0, 4.0])) == 3


@pytest.mark.slow
def test_the_model_learns_what_it_is_told(tmp_path):
    task, seen = supervised(tmp_path, [told(seed) for seed in range(2)], num_steps=200), []
    run(task, on_step_end=lambda step, losses: seen.append({name: float(value) for name, value in losses.items() if name.startswith("aux")}))
    assert set(seen[0]) == {"aux_near", "aux_offset", "aux_radius", "aux_shape", "aux_outline"}
    for name in ("aux_offset", "aux_radius", "aux_shape"):
        assert seen[-1][name] < 0.5 * seen[0][name], name
    assert "auxiliary.place.1.weight" not in load_dit(tmp_path / "dit.safetensors", operations=torch.nn, attention=None).state_dict()


def test_auxiliary_losses_teach_the_blocks_before_them_and_only_those(tmp_path):
    task = supervised(tmp_path, [told(0)])
    batch = task.dataset[0]
    task.loss(0, batch, torch.Generator().manual_seed(0))  # fills nothing that outlives it
    found = task.loss(0, batch, torch.Generator().manual_seed(0))
    found["aux_offset"].backward()
    assert task.model.blocks[0].ffn[2].weight.grad.abs().max() > 0 and task.model.head.head.weight.grad is None


def test_without_a_thing_nothing_is_told_but_every_head_has_a_gradient(tmp_path):
    task = supervised(tmp_path, [told(seed, has_thing=False) for seed in range(2)])
    found = task.loss(0, task.dataset[0], torch.Generator().manual_seed(0))
    assert all(found[name] == 0 for name in found if name.startswith("aux"))
    found["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in task.auxiliary.parameters())


def test_things_are_a_part_of_the_features_that_needs_no_model(tmp_path):
    bucket = Bucket((32, 32), 5, 2, 1.0, ("seen in reference",), ("add", "replace"))
    shards = [s for s in shards_of(bucket, vae="none", vlm="none", config=CONFIG, seed=4, folder=str(tmp_path), objects=True) if s.part == "objects"]
    (clips,) = compute([shards], 1)
    clips.futures[0].result()
    assert all(shard.is_written() for shard in shards) and "seen-in-reference_add_replace" in shards[0].path.name
    edits = PairedEdits(4, "train", (32, 32), 5, kinds=bucket.kinds, edits=bucket.edits)
    stored = load_file(shards[0].path)
    assert torch.equal(stored["1.cover"], object_of(edits.sample(1))["cover"])


@pytest.mark.parametrize(
    "change, what",
    [
        ({"auxiliary_blocks": (3,)}, "auxiliary_blocks"),
        ({"auxiliary_blocks": (3, 9)}, "from 0 to 8"),
        ({"gradient_checkpointing": True}, "set gradient_checkpointing"),
    ],
)
def test_heads_that_cannot_be_put_on_are_refused(tmp_path, change, what):
    recipe = replace(make_task(tmp_path).recipe, auxiliary_weight=0.1, **change)
    with pytest.raises(UserError) as error:
        check_auxiliary(recipe, 9, "recipe.yaml")
    assert what in str(error.value)
    check_auxiliary(replace(recipe, auxiliary_blocks=(0, 8), gradient_checkpointing=False), 9, "recipe.yaml")


def test_batches_in_a_row_may_be_of_one_size(tmp_path):
    dataset = make_task(tmp_path).dataset
    dataset.num_same_size = 2
    sizes = [(batch.states.shape[2], batch.target.shape[-1]) for batch in (dataset[step] for step in range(40))]
    assert all(a == b for a, b in zip(sizes[::2], sizes[1::2])) and len(set(sizes)) == 3
    assert not torch.equal(dataset[0].target, dataset[1].target)
