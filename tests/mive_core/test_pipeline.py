"""The pipeline with random weights: one way through, and what refuses to go through it."""

import itertools
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.attention import torch_attention
from mive_core.delivery import detailed_last_frame
from mive_core.errors import UserError
from mive_core.flow import schedule
from mive_core.formats.checkpoint import load_dit, save_dit
from mive_core.pipeline import Pipeline
from mive_core.stretches import latent_order, stretches
from mive_core.types import Clip, EditRequest, Keyframe


@pytest.fixture(scope="module")
def pipeline(random_models):
    return Pipeline.load(random_models)


def make_request(frames=5, height=32, width=48, instruction="make it night"):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(shape, generator=generator)
    return EditRequest(Clip(draw(frames, height, width, 3), 8.0), draw(height, width, 3), instruction)


@pytest.mark.parametrize("frames,height,width", [(1, 32, 32), (5, 32, 48), (9, 48, 32)])
def test_the_edited_clip_has_the_sources_shape_and_rate(pipeline, frames, height, width):
    request = make_request(frames, height, width)
    edited = pipeline.edit(request)
    assert edited.frames.shape == request.source.frames.shape and edited.fps == 8.0
    assert edited.frames.min() >= 0 and edited.frames.max() <= 1


def test_the_reference_is_one_latent_frame_in_front_and_never_in_the_output(pipeline):
    request = make_request()
    latents = pipeline.encode(request)
    assert latents.source.shape == (1, 16, 2, 4, 6) and latents.reference.shape == (1, 16, 1, 4, 6)
    condition = pipeline.vlm.condition(request, pipeline.config)
    with torch.inference_mode():
        out = pipeline.denoise(latents, [condition], schedule(1, 1.0), 1.0, seed=0)
    assert out.shape == latents.source.shape


def test_one_step_is_noise_minus_velocity(pipeline):
    """The sampler against the arithmetic written out."""
    request = make_request()
    latents, condition = pipeline.encode(request), pipeline.vlm.condition(request, pipeline.config)
    noise = torch.randn(latents.source.shape, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        tokens = pipeline.dit.embed_condition(condition.states)
        velocity = pipeline.dit(noise, latents.source, latents.reference, tokens, torch.ones(1))
        got = pipeline.denoise(latents, [condition], schedule(1, 3.0), 1.0, seed=7)
    assert torch.allclose(got, noise - velocity, atol=1e-6)


def test_guidance_is_against_the_empty_instruction(pipeline):
    request = make_request()
    empty = replace(request, instruction="")
    assert not torch.equal(pipeline.edit(request, cfg=4.0).frames, pipeline.edit(request).frames)
    assert torch.allclose(pipeline.edit(empty, cfg=4.0).frames, pipeline.edit(empty).frames, atol=1e-5)


@pytest.mark.parametrize("options", [{"cfg": math.nan}, {"cfg": math.inf}, {"shift": math.nan}, {"shift": -1.0}, {"steps": 0}])
def test_sampling_options_that_cannot_be(pipeline, options):
    with pytest.raises(UserError, match=next(iter(options))):
        pipeline.edit(make_request(), **options)


def test_reference_of_another_size_is_refused(pipeline):
    request = replace(make_request(), reference=torch.rand(48, 48, 3))
    with pytest.raises(UserError, match="48x48.*48x32"):
        pipeline.edit(request)


def test_other_layers_of_the_same_number_run_and_change_the_result(random_models, pipeline):
    other = Pipeline.load(random_models, "2,3")
    assert other.config.layers == (2, 3)
    assert not torch.equal(other.edit(make_request()).frames, pipeline.edit(make_request()).frames)


def test_a_layer_count_that_the_checkpoint_was_not_made_for(random_models):
    with pytest.raises(UserError, match="got 3 .*expected 2"):
        Pipeline.load(random_models, "1,2,3")


def test_a_vlm_that_the_checkpoint_was_not_made_for(random_models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(random_models, folder)
    dit = load_dit(random_models, attention=torch_attention)
    state = {
        k: v.repeat(*([1] * (v.ndim - 1)), 2) if k.startswith(("context.norms", "context.projections")) and not k.endswith("bias") else v
        for k, v in dit.state_dict().items()
    }
    save_dit(folder / "dit.safetensors", state, replace(dit.config, vlm="Qwen3-VL-wide", vlm_width=256))
    with pytest.raises(UserError, match="width 128.*Qwen3-VL-wide of width 256"):
        Pipeline.load(folder)


@pytest.mark.parametrize(
    "wrong,taken_from,message",
    [
        ("dit.safetensors", "vae.safetensors", "looks like a Wan VAE"),
        ("vae.safetensors", "dit.safetensors", "Wan diffusion model|MiVE DiT"),
        ("dit.safetensors", "vlm/model.safetensors", "looks like a Qwen3-VL model"),
    ],
)
def test_swapped_files_are_called_by_name(random_models, tmp_path, wrong, taken_from, message):
    folder = tmp_path / "models"
    shutil.copytree(random_models, folder)
    shutil.copy(random_models / taken_from, folder / wrong)
    with pytest.raises(UserError, match=message):
        Pipeline.load(folder)


def test_a_wan_checkpoint_in_the_dits_place_is_named(random_models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(random_models, folder)
    state = load_file(folder / "dit.safetensors")
    wan = {k: v for k, v in state.items() if not k.startswith("context.")} | {"blocks.0.cross_attn.q.weight": torch.zeros(4, 4)}
    save_file(wan, folder / "dit.safetensors")
    with pytest.raises(UserError, match="Wan T2V.*context.fuse.weight"):
        Pipeline.load(folder)


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="tiny"):
        Pipeline.load(tmp_path / "nowhere")


def test_latents_that_leave_the_finite_numbers_are_an_error(pipeline):
    request, latents = make_request(), pipeline.encode(make_request())
    broken = replace(latents, source=latents.source * math.nan)
    with torch.inference_mode(), pytest.raises(UserError, match="no longer finite"):
        pipeline.denoise(broken, [pipeline.vlm.condition(request, pipeline.config)], schedule(2, 1.0), 1.0, seed=0)


def test_guidance_acts_only_above_the_checkpoints_time(pipeline):
    request = make_request()
    frames = lambda above, cfg: replace(pipeline, config=replace(pipeline.config, guided_above=above)).edit(request, steps=3, cfg=cfg).frames
    assert torch.equal(frames(1.0, 4.0), frames(1.0, 1.0))
    everywhere, first_only = frames(0.0, 4.0), frames(0.9, 4.0)
    assert not torch.equal(first_only, everywhere) and not torch.equal(first_only, frames(0.0, 1.0))


@pytest.mark.parametrize(
    "num_frames, spans",
    [
        (1, [(0, 1)]),
        (33, [(0, 33)]),
        (37, [(0, 17), (16, 37)]),  # one latent frame too many: two halves, not a rest of five frames
        (97, [(0, 33), (32, 65), (64, 97)]),
        (161, [(0, 33), (32, 65), (64, 97), (96, 129), (128, 161)]),
    ],
)
def test_stretches_share_a_frame_and_are_of_nearly_equal_length(num_frames, spans):
    assert stretches(num_frames, 33) == spans


@pytest.mark.parametrize("length", [5, 9, 33, 81])
def test_stretches_cover_every_length(length):
    for num_frames in range(1, 400, 4):
        spans = stretches(num_frames, length)
        assert spans[0][0] == 0 and spans[-1][1] == num_frames and all(b[0] == a[1] - 1 for a, b in itertools.pairwise(spans))
        sizes = {last - first for first, last in spans}
        assert all(size % 4 == 1 and size <= length for size in sizes) and max(sizes) - min(sizes) <= 4


def test_no_latent_frame_of_a_long_clip_holds_a_cut():
    shots = [torch.rand(1, 16, 16, 3).expand(count, -1, -1, -1) for count in (12, 7, 6)]
    assert latent_order(torch.cat(shots), 17) == [*range(12), 11, *range(12, 19), 18, *range(19, 25), 24, 24]
    assert latent_order(torch.cat(shots), 25) == [*range(25)]
    assert latent_order(torch.cat(shots)[:24], 25) == [*range(24), 23]


def test_after_a_cut_frames_and_keyframes_keep_their_numbers(pipeline):
    """Twelve frames of one shot and five of another: the second is padded to begin with a latent frame of its own."""
    long = replace(pipeline, config=replace(pipeline.config, edit_frames=13, fix_first_frame=False))
    request = make_request(17)
    frames = torch.cat([request.source.frames[:1].expand(12, -1, -1, -1) * 0.2, 0.8 + request.source.frames[1:2].expand(5, -1, -1, -1) * 0.2])
    request = replace(request, source=Clip(frames, 8.0))
    plain, keyed = (long.run(replace(request, keyframes=keyframes), steps=1) for keyframes in ((), (Keyframe(15, request.reference),)))
    assert plain.edited.frames.shape == plain.round_trip.shape == frames.shape
    by_hand = torch.cat([frames[8:12], frames[11:12], frames[12:], frames[-1:].expand(3, -1, -1, -1)])
    assert torch.equal(plain.round_trip[9:12], pipeline.vae.decode(pipeline.vae.encode(by_hand))[1:4])
    assert torch.equal(plain.round_trip[12:], pipeline.vae.decode(pipeline.vae.encode(by_hand))[5:10])
    assert torch.equal(plain.edited.frames[:9], keyed.edited.frames[:9]) and not torch.equal(plain.edited.frames[9:], keyed.edited.frames[9:])


@pytest.mark.parametrize("num_frames", [17, 15])
def test_a_stretch_is_an_edit_whose_reference_is_the_last_frame_before_it(pipeline, num_frames):
    """Written out by hand; 15 frames leave a last stretch that is no 4n+1."""
    long = replace(pipeline, config=replace(pipeline.config, edit_frames=9))
    request = make_request(num_frames)
    result = long.run(request, steps=2)
    frames = request.source.frames
    first = pipeline.run(replace(request, source=Clip(frames[:9], 8.0)), steps=2)
    rest = torch.cat([frames[8:], frames[-1:].expand(17 - num_frames, -1, -1, -1)])
    reference = detailed_last_frame(frames[:9], first.edited.frames, first.round_trip)
    second = pipeline.run(replace(request, source=Clip(rest, 8.0), reference=reference), steps=2)
    for got, a, b in ((result.edited.frames, first.edited.frames, second.edited.frames), (result.round_trip, first.round_trip, second.round_trip)):
        assert torch.equal(got, torch.cat([a, b[1:]])[:num_frames])
    assert torch.equal(long.edit(request, steps=2).frames, result.edited.frames)
