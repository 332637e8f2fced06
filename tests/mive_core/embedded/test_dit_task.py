"""Training the DiT: batches, loss, features, and a resume that changes nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.embedded.dit_task import DiTRecipe, DiTTask, FeatureBatches, build, channel_weights, deepen, initialise, initialise_identity
from mive_core.embedded.features import Bucket
from mive_core.embedded.vae_network import WholeClipVAE
from mive_core.errors import UserError
from mive_core.flow import euler, flow_path, schedule
from mive_core.formats.checkpoint import inspect, load_dit
from mive_core.pipeline import EMBEDDED
from mive_core.reference import fix_first_frame
from mive_core.train.flow_matching import check_recipe
from mive_core.train.loop import run, step_seed
from mive_core.train.objective import EditFeatures, cauchy_loss, flow_matching_losses, latent_mask, loss_by_time, one_step_prediction, reference_times
from mive_core.train.recipe import parse_recipe

CONFIG = replace(PRESETS["tiny"], num_blocks=1)
VALUES = {
    "task": "dit",
    "preset": "tiny",
    "vae": "v",
    "vlm": "w",
    "features_dir": "f",
    "features_seed": 0,
    "num_steps": 6,
    "batch_size": 2,
    "buckets": [[32, 32, 5, 6, 1.0]],
    "learning_rate": "3e-3",
    "num_warmup_steps": 1,
    "num_workers": 0,
    "ema_decay": 0.5,
    "checkpoint_every_s": 0.0,
    "log_every": 1,
}


def features(num_tokens, seed, grid=(2, 4, 4)):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return EditFeatures(
        target=draw(16, *grid),
        source=draw(16, *grid),
        reference=draw(16, 1, *grid[1:]),
        states=draw(2, num_tokens, CONFIG.vlm_width),
        mask=(draw(*grid) > 0).float(),
    )


def batches():
    entries = [features(5 + i % 2, i) for i in range(6)]
    small = [features(7, 9, (2, 2, 2))]
    return FeatureBatches([(Bucket((32, 32), 5, 6, 0.7), entries), (Bucket((16, 16), 5, 1, 0.3), small)], batch_size=2, seed=3)


def make_task(folder, **changes):
    recipe = parse_recipe(DiTRecipe, VALUES | {"output_dir": str(folder / "run"), "export": str(folder / "dit.safetensors")} | changes)
    return DiTTask(recipe, CONFIG, batches())


def test_a_batch_is_of_one_size_and_one_length_and_a_function_of_the_step():
    dataset = batches()
    seen = set()
    for step in range(40):
        batch, again = dataset[step], dataset[step]
        assert torch.equal(batch.target, again.target) and len(batch.target) == 2
        seen.add((batch.states.shape[2], batch.target.shape[-1]))
    assert seen == {(5, 4), (6, 4), (7, 2)}


def test_latent_mask_gives_frame_0_a_cell_of_its_own():
    mask = torch.zeros(9, 16, 16, dtype=torch.bool)
    mask[0, 0, 0] = mask[5, 15, 8] = True
    cells = latent_mask(mask)
    assert cells.shape == (3, 2, 2)
    assert cells.nonzero().tolist() == [[0, 0, 0], [2, 1, 1]]
    assert latent_mask(mask[:1]).shape == (1, 2, 2)


def test_a_deepened_dit_does_what_it_did_and_can_learn_more(tmp_path):
    task = make_task(tmp_path)
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    deep = MiVEDiT(replace(CONFIG, num_blocks=3), operations=nn, attention=torch_attention)
    deep.load_state_dict(deepen(task.model.state_dict(), 3))
    batch, t = task.dataset[0], torch.tensor([0.3, 0.8])
    outputs = [model(batch.target, batch.source, batch.reference, model.embed_condition(batch.states), t) for model in (task.model, deep)]
    torch.testing.assert_close(*outputs)
    outputs[1].square().mean().backward()
    assert all(block.ffn[2].weight.grad.abs().max() > 0 and block.self_attn.o.weight.grad.abs().max() > 0 for block in deep.blocks)


def test_muon_moves_the_blocks_matrices_and_adamw_the_rest(tmp_path):
    task = make_task(tmp_path, muon_learning_rate=0.01, num_steps=3)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in task.optimizers.values()]
    assert held[0].isdisjoint(held[1]) and len(held[0] | held[1]) == len(list(task.model.parameters()))
    weight, bias = task.model.blocks[0].ffn[0].weight, task.model.blocks[0].ffn[0].bias
    assert id(weight) in held[1] and id(bias) in held[0]
    run(task)
    task = make_task(tmp_path, muon_learning_rate=0.01, num_steps=3)
    assert not torch.equal(weight, task.model.blocks[0].ffn[0].weight) and not torch.equal(bias, task.model.blocks[0].ffn[0].bias)


def test_a_steps_operations_count_the_forward_pass_of_its_drafts(tmp_path):
    plain, drafting = make_task(tmp_path, batch_size=4), make_task(tmp_path, batch_size=4, scheduled_sampling_ratio=0.5)
    batch = plain.dataset[0]
    once, more = plain.workload(batch), drafting.workload(batch)
    assert (more.num_samples, more.num_tokens) == (once.num_samples, once.num_tokens)
    assert more.flops == pytest.approx(once.flops * (1 + 2 / (4 * 3)))  # two of four; a learned clip is three forward passes


def test_the_time_layers_move_at_their_own_rate(tmp_path):
    """AdamW's first step moves every weight by its rate, however large the gradient."""
    task = make_task(
        tmp_path,
        learning_rate=1e-2,
        time_learning_rate=1e-4,
        muon_learning_rate=0.01,
        weight_decay=0.0,
        num_steps=1,
        num_warmup_steps=1,
        max_grad_norm=0.0,
        ema_decay=0.0,
    )
    assert sum(len(group["params"]) for optimizer in task.optimizers.values() for group in optimizer.param_groups) == len(list(task.model.parameters()))
    nn.init.normal_(task.model.head.head.weight, std=0.05)
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    run(task)
    moved = {name: (p - before[name]).abs().max().item() for name, p in task.model.named_parameters()}
    for name in ("time_embedding.0.weight", "time_projection.1.weight", "blocks.0.modulation", "head.modulation"):
        assert moved[name] == pytest.approx(1e-4, rel=0.05), name
    for name in ("patch_embedding.weight", "blocks.0.ffn.0.bias", "head.head.weight"):
        assert moved[name] == pytest.approx(1e-2, rel=0.05), name


def test_a_silent_matrix_wakes_by_the_recipes_floor(tmp_path):
    """What starts at zero has no norm to move a fraction of."""
    task = make_task(tmp_path, muon_learning_rate=0.01, muon_min_norm=20.0, num_steps=1, max_grad_norm=0.0, ema_decay=0.0)
    initialise(task.model)
    nn.init.normal_(task.model.head.head.weight, std=0.05)
    silent = task.model.blocks[0].ffn[2].weight
    nn.init.zeros_(silent)
    run(task)
    assert silent.norm().item() == pytest.approx(0.01 * 20.0, rel=0.01)


def test_the_loss_weighs_edited_cells(tmp_path):
    task = make_task(tmp_path)
    batch = task.dataset[0]
    loss = lambda mask: task.loss(0, replace(batch, mask=mask), torch.Generator().manual_seed(0))
    everywhere, nowhere = loss(torch.ones_like(batch.mask)), loss(torch.zeros_like(batch.mask))
    assert torch.allclose(everywhere["loss"], nowhere["loss"])  # weights are relative
    mixed = loss(batch.mask)
    share = batch.mask.mean()
    expected = (4 * share * mixed["edited"] + (1 - share) * mixed["kept"]) / (4 * share + 1 - share)
    assert torch.allclose(mixed["loss"], expected, atol=1e-5)


def test_with_a_floor_clips_and_regions_count_alike_by_their_logarithm():
    """By hand: one clip is right to 0.01 in most of its cells, one far off in few; the third is edited everywhere."""
    mask = torch.zeros(3, 2, 4, 4)
    mask[0, :, :3], mask[1, 0, 0, 0], mask[2] = 1, 1, 1
    error = torch.tensor([0.01, 2.0, 0.5]).view(3, 1, 1, 1) * mask + 0.1 * (1 - mask)
    counted = lambda e: 0.05 * math.log(1 + e / 0.05)
    expected = (4 * (counted(0.01) + counted(2.0) + counted(0.5)) + 2 * counted(0.1)) / (3 * 4 + 2)
    assert cauchy_loss(mask, error, 4.0, 0.05).item() == pytest.approx(expected, rel=1e-5)
    assert cauchy_loss(mask, error, 4.0, 1e6).item() == pytest.approx((4 * 2.51 + 2 * 0.1) / 14, rel=1e-4)  # all far below it


def test_a_recipe_with_a_floor_trains_by_it(tmp_path):
    plain, by_log = (make_task(tmp_path, cauchy_scale=floor) for floor in (0.0, 0.05))
    losses = [task.loss(0, task.dataset[0], torch.Generator().manual_seed(0)) for task in (plain, by_log)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in ("edited", "kept"))
    assert 0 < losses[1]["loss"] < losses[0]["loss"]
    with pytest.raises(UserError, match="cauchy_scale"):
        check_recipe(parse_recipe(DiTRecipe, VALUES | {"output_dir": "o", "export": "e", "cauchy_scale": -0.1}))


def test_errors_are_told_apart_by_time():
    pairs = loss_by_time(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.05, 0.9, 1.0, 0.19]))
    assert {name: pair.tolist() for name, pair in pairs.items() if pair[1]} == {"loss_t0.0-0.2": [9.0, 2.0], "loss_t0.8-1.0": [6.0, 2.0]}


def test_a_drafted_entry_is_held_by_the_target_that_its_velocity_leads_to(tmp_path):
    task = make_task(tmp_path)
    batch, t = task.dataset[0], torch.tensor([0.4, 0.9])
    noise = torch.randn(batch.target.shape)
    draft = one_step_prediction(task.model, batch, batch.states, noise[:1])
    x_t = (1 - t.view(2, 1, 1, 1, 1)) * torch.cat([draft, batch.target[1:]]) + t.view(2, 1, 1, 1, 1) * noise
    velocity = task.model(x_t, batch.source, batch.reference, task.model.embed_condition(batch.states), t)
    errors = torch.cat([(x_t - 0.4 * velocity - batch.target)[:1], (velocity - (noise - batch.target))[1:]]).square().mean(dim=1)
    losses = flow_matching_losses(task.model, batch, batch.states, noise, t, 1.0, predictions=draft)
    assert torch.allclose(losses["loss"], errors.mean(), rtol=1e-4)
    assert torch.allclose(losses["edited"], (batch.mask * errors).sum() / batch.mask.sum(), rtol=1e-4)


def test_the_first_draft_is_one_step_of_sampling(tmp_path):
    task = make_task(tmp_path)
    batch = task.dataset[0]
    noise, condition, times = torch.randn(batch.target.shape), task.model.embed_condition(batch.states), reference_times(batch)

    def velocity(x, t):
        t = torch.full((2,), t)
        return fix_first_frame(task.model(x, batch.source, batch.reference, condition, t, times), x, t, batch.source, batch.reference)

    with torch.no_grad():
        stepped = euler(velocity, noise, schedule(1, 3.0))
    draft = one_step_prediction(task.model, batch, batch.states, noise)
    assert not draft.requires_grad and torch.allclose(draft, stepped, atol=1e-5)


def test_drafts_leave_every_weight_its_gradient(tmp_path):
    """Also those whose copy in bfloat16 the draft's pass made, which records none."""
    gradients, losses = {}, {}
    for share in (0.0, 0.5):
        task = make_task(tmp_path, bf16=True, scheduled_sampling_ratio=share)
        initialise(task.model)
        nn.init.normal_(task.model.head.head.weight, std=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            losses[share] = task.loss(0, task.dataset[0], torch.Generator().manual_seed(0))["loss"]
        losses[share].backward()
        gradients[share] = {name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert gradients[0.5] == gradients[0.0] and len(gradients[0.5]) > 20
    assert losses[0.5] != losses[0.0]


@pytest.mark.parametrize("share", [0.2, 1.3, -0.5])
def test_a_share_of_drafts_is_a_part_of_the_batch(share):
    with pytest.raises(UserError, match="scheduled_sampling_ratio"):
        check_recipe(parse_recipe(DiTRecipe, VALUES | {"output_dir": "o", "export": "e", "scheduled_sampling_ratio": share}))


def test_the_steps_by_hand(tmp_path):
    """What the embedded models were trained by, written out: a change of it would make their recipes train something else."""
    task = make_task(tmp_path, max_grad_norm=0.0, time_shift=6.0, decay_ratio=0.5)
    model = MiVEDiT(CONFIG, operations=nn, attention=torch_attention)
    model.load_state_dict(task.model.state_dict())
    run(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    losses = []
    for step, rate in enumerate((1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3)):
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        batch, generator = task.dataset[step], torch.Generator().manual_seed(step_seed(0, step))
        noise, t = torch.randn(batch.target.shape, generator=generator), torch.rand(2, generator=generator)
        path = flow_path(batch.target, noise, 6 * t / (1 + 5 * t))
        error = (model(path.x_t, batch.source, batch.reference, model.embed_condition(batch.states), path.t) - path.velocity).square().mean(dim=1)
        weight = 1 + 3 * batch.mask
        loss = (weight * error).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses
    newest = load_file(max((tmp_path / "run").glob("step_*")))
    assert all(torch.equal(newest[f"module.dit.{name}"], value) for name, value in model.state_dict().items())


def test_resume_equals_uninterrupted_and_the_export_loads(tmp_path):
    run(make_task(tmp_path / "whole"))
    run(make_task(tmp_path / "halves"), stop_at=3)
    task = make_task(tmp_path / "halves")
    task.recipe = replace(task.recipe, version="7")  # a resumed run may give it, no step depends on it
    run(task)
    assert inspect(tmp_path / "halves/dit.safetensors")["metadata"] == {"mive.version": "7"}
    whole, halves = (load_dit(tmp_path / name / "dit.safetensors", attention=torch_attention) for name in ("whole", "halves"))
    assert whole.config == CONFIG
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True))


def test_a_second_run_goes_on_from_the_first(tmp_path):
    run(make_task(tmp_path))
    recipe = replace(make_task(tmp_path).recipe, start_from=str(tmp_path / "dit.safetensors"))
    state = load_dit(tmp_path, attention=torch_attention).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(DiTTask(recipe, CONFIG, batches()).model.state_dict().values(), state.values(), strict=True))


def test_a_copier_start_is_a_velocity_towards_the_source():
    torch.manual_seed(0)
    model = MiVEDiT(PRESETS["tiny"], operations=torch.nn, attention=torch_attention)
    initialise(model)
    batch = batches()[3]
    noise, t = torch.randn(batch.target.shape), torch.full((2,), 0.9)
    path = flow_path(batch.source, noise, t)  # nothing is edited

    def error():
        with torch.no_grad():
            velocity = model(path.x_t, batch.source, batch.reference, model.embed_condition(batch.states), t)
        return (velocity - path.velocity).square().mean() / path.velocity.square().mean()

    plain = error()
    initialise_identity(model)
    assert error() < 0.3 < 0.9 < plain


def test_a_copier_start_needs_the_width():
    narrow = MiVEDiT(replace(CONFIG, width=96, num_heads=3, patch_size=(1, 2, 2)), operations=torch.nn, attention=torch_attention)
    with pytest.raises(UserError, match="at least 128"):
        initialise_identity(narrow)


@pytest.mark.slow
def test_channel_weights_follow_what_the_decoder_shows():
    torch.manual_seed(0)
    vae = WholeClipVAE(8)
    vae.conv2.weight.data[:, 5] = 0  # channel 5 is not looked at
    weights = channel_weights(vae, 1.0)
    assert weights[5] < 1e-3 * weights[:5].min() and torch.isclose(weights.mean(), torch.tensor(1.0))
    assert torch.allclose(channel_weights(vae, 2.0), weights**2 / (weights**2).mean())


@pytest.mark.slow
def test_bf16_training_learns_the_same(tmp_path):
    losses = {}
    for bf16 in (False, True):
        task = make_task(tmp_path / str(bf16), bf16=bf16, num_steps=30)
        run(task)
        lines = (tmp_path / str(bf16) / "run" / "log.jsonl").read_text().splitlines()
        losses[bf16] = [json.loads(line)["loss"] for line in lines]
        assert all(p.dtype == torch.float32 for p in task.model.parameters())
    assert abs(losses[True][0] - losses[False][0]) < 0.02 * losses[False][0]
    assert all(series[-1] < 0.9 * series[0] for series in losses.values())


def test_recipe_refuses_unknown_keys():
    with pytest.raises(UserError, match="leraning_rate"):
        parse_recipe(DiTRecipe, VALUES | {"output_dir": "o", "export": "e", "leraning_rate": 1.0})


def test_clips_that_are_drawn_from_grow_to_all_and_a_step_is_the_same_whatever_was_asked_before():
    entries = [features(5, seed) for seed in range(200)]
    new = lambda: FeatureBatches([(Bucket((32, 32), 5, 200, 1.0), entries)], batch_size=16, seed=3, num_growing=10)
    dataset = new()
    assert [dataset.num_available(step, 200) for step in (0, 3, 4, 9, 10, 99)] == [64, 128, 128, 200, 200, 200]
    of = lambda batch: {next(i for i, entry in enumerate(entries) if torch.equal(entry.target, target)) for target in batch.target}
    assert max(of(dataset[0])) < 64 < max(of(dataset[12]))
    late = new()
    late[12]
    assert torch.equal(late[0].target, dataset[0].target) and torch.equal(new()[4].target, dataset[4].target)


def test_clips_that_grow_are_read_in_the_training_process(tmp_path):
    with pytest.raises(UserError, match="set num_workers to 0"):
        build(VALUES | {"growth_ratio": 0.5, "num_workers": 1, "output_dir": str(tmp_path), "export": str(tmp_path / "dit.safetensors")}, "recipe.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("growth_ratio", [0.0, 0.5])
def test_a_recipe_trains_on_clips_that_it_draws_whether_before_or_meanwhile(tmp_path, growth_ratio):
    tiny = EMBEDDED["tiny"]
    values = VALUES | {
        "vae": str(tiny / "vae.safetensors"),
        "vlm": str(tiny / "vlm"),
        "features_dir": str(tmp_path / "features"),
        "num_steps": 4,
        "buckets": [[32, 32, 5, 3, 1.0]],
        "num_blocks": 1,
        "growth_ratio": growth_ratio,
        "num_feature_processes": 1,
        "output_dir": str(tmp_path / "run"),
        "export": str(tmp_path / "dit.safetensors"),
    }
    task = build(values, "recipe.yaml")
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == (0 if growth_ratio else 2)
    run(task)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 2
    assert load_dit(tmp_path, attention=torch_attention).config.num_blocks == 1
