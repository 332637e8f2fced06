import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from mive_core.embedded.natural_clips import natural_clip
from mive_core.embedded.synthetic import random_clip
from mive_core.embedded.vae_clips import ClipCrops, Phase
from mive_core.embedded.vae_network import WholeClipVAE, decode_clips, encode_clips, read_whole_clip_vae, skip_empty_branches
from mive_core.embedded.vae_pca_init import initialise_from_pca
from mive_core.embedded.vae_task import LOG_MSE_EPS, as_video, build, distortion, fold_statistics, initialise, stream_weights
from mive_core.formats.safetensors_file import read_tensors
from mive_core.train.loop import run
from mive_core.train.optim import Muon, orthogonalise
from mive_core.vae import LATENTS_MEAN, LATENTS_STD, VAE


def values(folder, **changes):
    return {
        "task": "vae",
        "output_dir": str(folder / "run"),
        "export": str(folder / "vae.safetensors"),
        "num_steps": 6,
        "dim": 8,
        "num_clips": 4,
        "num_workers": 0,
        "phases": [[0.5, 2, 5, 16], [1.0, 1, 5, 32]],
        "num_statistics_clips": 2,
        "checkpoint_every_s": 0.0,
        "log_every": 1,
    } | changes


def video(num_clips: int = 2) -> torch.Tensor:
    clips = [torch.from_numpy(natural_clip(seed, (32, 32), 9)) for seed in range(num_clips)]
    return torch.stack(clips).permute(0, 4, 1, 2, 3) * 2 - 1


@torch.no_grad()
def test_the_colour_path_is_there_before_training():
    torch.manual_seed(0)
    vae = WholeClipVAE(8)
    initialise(vae)
    clip = video()
    means = F.avg_pool2d(clip[:, :, 0], 8)
    latents = vae.encode(clip)[0]
    assert torch.corrcoef(torch.stack([latents[:, :3, 0].flatten(), means.flatten()]))[0, 1] > 0.97
    blurred = F.interpolate(F.avg_pool2d(clip.transpose(1, 2).flatten(0, 1), 8), scale_factor=8)
    error = vae.decode(latents).transpose(1, 2).flatten(0, 1) - blurred
    assert error.square().mean() < 0.2 * blurred.square().mean()


@pytest.mark.parametrize("dim", [8, 16])
@torch.no_grad()
def test_the_principal_start_codes_better_than_means(dim):
    torch.manual_seed(0)
    vae = WholeClipVAE(dim)
    clip = video(6)
    initialise_from_pca(vae, clip)
    for module in vae.modules():
        if hasattr(module, "active"):
            module.active = False
    latents = vae.encode(clip)[0]
    assert latents[:, :15].std(dim=(0, 2, 3, 4)).min() > 0.05
    means = F.avg_pool2d(clip.transpose(1, 2).flatten(0, 1), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    error = (vae.decode(latents).transpose(1, 2).flatten(0, 1) - clip.transpose(1, 2).flatten(0, 1)).square().mean()
    assert error < (means - clip.transpose(1, 2).flatten(0, 1)).square().mean()


@torch.no_grad()
def test_folding_moves_the_statistics_and_nothing_else():
    torch.manual_seed(0)
    vae = WholeClipVAE(8)
    initialise(vae)
    clip = video(4)
    latents = vae.encode(clip)[0]
    before = vae.decode(latents)
    weights = {key: value.clone() for key, value in vae.state_dict().items()}
    flat = latents.transpose(0, 1).flatten(1)
    fold_statistics(weights, flat.mean(1), flat.std(1))
    vae.load_state_dict(weights)
    folded, log_variance = vae.encode(clip)
    flat = folded.transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.tensor(LATENTS_MEAN), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(flat.std(1), torch.tensor(LATENTS_STD), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(vae.decode(folded), before, atol=1e-4, rtol=1e-4)
    assert log_variance.isfinite().all()


def test_a_run_exports_a_vae_that_loads_everywhere(tmp_path):
    task = build(values(tmp_path))
    run(task)
    path = tmp_path / "vae.safetensors"
    with safe_open(str(path), framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    fast, vae = read_whole_clip_vae(path), VAE.load(path)
    frames = torch.from_numpy(natural_clip(5, (32, 48), 9))
    with torch.no_grad():
        latents = vae.encode(frames)
        assert (encode_clips(fast, frames[None]) - latents).abs().max() < 1e-4
        assert (decode_clips(fast, latents)[0] - vae.decode(latents)).abs().max() < 1e-4


@pytest.mark.slow
def test_an_interrupted_run_ends_bit_equal(tmp_path):
    run(build(values(tmp_path / "a")))
    run(build(values(tmp_path / "b")), stop_at=4)
    run(build(values(tmp_path / "b")))
    whole, halves = (read_tensors(tmp_path / name / "vae.safetensors") for name in ("a", "b"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)


def test_the_decoder_alone_leaves_the_latents_as_they_are(tmp_path):
    run(build(values(tmp_path)))
    first = VAE.load(tmp_path / "vae.safetensors")
    changes = {"start_from": str(tmp_path / "vae.safetensors"), "export": str(tmp_path / "second.safetensors")}
    run(build(values(tmp_path, **changes, output_dir=str(tmp_path / "second"))))
    second = VAE.load(tmp_path / "second.safetensors")
    frames = torch.rand(5, 32, 32, 3)
    with torch.no_grad():
        latents = first.encode(frames)
        assert torch.equal(latents, second.encode(frames))
        assert not torch.equal(first.decode(latents), second.decode(latents))


def test_a_frozen_encoder_is_the_principal_start_to_the_bit(tmp_path):
    changes = {"frozen_encoder": True, "num_basis_clips": 4, "dim": 16, "bf16": True}
    before = build(values(tmp_path, **changes))
    before.export(tmp_path / "before.safetensors")
    run(build(values(tmp_path, **changes)))
    first, last = (read_tensors(tmp_path / name) for name in ("before.safetensors", "vae.safetensors"))
    encodes = lambda key: key.startswith(("encoder.", "conv1."))
    assert all(torch.equal(first[key], last[key]) for key in first if encodes(key))
    assert not all(torch.equal(first[key], last[key]) for key in first)


@torch.no_grad()
def test_skipping_empty_branches_changes_no_latent(tmp_path):
    torch.manual_seed(0)
    vae, clip = WholeClipVAE(16), video(6)
    initialise_from_pca(vae, clip)
    whole = vae.encode(clip)[0]
    skip_empty_branches(vae.encoder)
    assert not any(module.active for module in vae.encoder.modules() if hasattr(module, "active"))
    assert torch.equal(vae.encode(clip)[0], whole)
    skip_empty_branches(vae.decoder)
    assert all(module.active for module in vae.decoder.modules() if hasattr(module, "active"))


def test_stream_weights_do_not_outgrow_their_bound(tmp_path):
    task = build(values(tmp_path, max_growth=1.0))
    before = [float(weight.detach().norm()) for weight in stream_weights(task.vae)]
    with torch.no_grad():
        for weight in stream_weights(task.vae):
            weight.mul_(3)
    task.after_step(0)
    assert len(before) == 17 - 2
    assert [float(w.detach().norm()) for w in stream_weights(task.vae)] == pytest.approx(before, rel=1e-4)


def test_crops_follow_the_curriculum_and_the_seed(tmp_path):
    phases = (Phase(0.5, 2, 5, 16), Phase(1.0, 1, 9, 32))
    crops = ClipCrops(tmp_path, 4, 10, phases, seed=3)
    assert [tuple(crops[step].shape) for step in (0, 4, 5, 9)] == [(2, 5, 16, 16, 3)] * 2 + [(1, 9, 32, 32, 3)] * 2
    again = ClipCrops(tmp_path, 4, 10, phases, seed=3)
    assert torch.equal(crops[7], again[7]) and not torch.equal(crops[7], crops[8])
    assert crops[0].dtype == torch.uint8


def test_the_phases_are_shares_of_the_run_whatever_a_step_takes(tmp_path):
    """They once counted batches as steps: with two batches a step the second phase began after a quarter of the run."""
    phases = ((0.5, 1, 5, 16), (1.0, 1, 9, 32))
    task = build(values(tmp_path, phases=phases, num_steps=10, gradient_accumulation_steps=2))
    assert [task.dataset.phase(number).size for number in (0, 9, 10, 19)] == [16, 16, 32, 32]


def test_a_share_of_the_pool_is_natural(tmp_path):
    pool = ClipCrops(tmp_path, 4, 1, (Phase(1.0, 1, 5, 16),), seed=3, natural_ratio=0.25).pool
    as_pixels = [np.round(draw(3 * 4 + index, (96, 96), 17) * 255) for index, draw in enumerate([random_clip] * 3 + [natural_clip])]
    assert all((clip == pixels).all() for clip, pixels in zip(pool, as_pixels))


def test_the_logarithm_of_the_error_is_taken_clip_by_clip():
    clips = as_video(torch.randint(0, 256, (2, 5, 16, 16, 3), dtype=torch.uint8))
    off = torch.tensor([0.1, 1.0]).view(2, 1, 1, 1, 1)
    assert distortion(clips + off, clips)["log_mse"] == pytest.approx(math.log(0.1), abs=2e-3)
    assert distortion(clips, clips)["log_mse"] == pytest.approx(math.log(LOG_MSE_EPS))


def test_distortion_of_equal_clips_is_zero():
    clip = as_video(torch.randint(0, 256, (1, 5, 16, 16, 3), dtype=torch.uint8))
    assert all(value == 0 for name, value in distortion(clip, clip).items() if name != "log_mse")
    assert distortion(clip + 0.5, clip)["edges"] < 1e-6 < 0.49 < distortion(clip + 0.5, clip)["blocks"]


@pytest.mark.parametrize("shape", [(8, 24), (32, 8), (16, 16)])
def test_orthogonalised_matrices_have_even_singular_values(shape):
    matrix = torch.randn(shape)
    values = torch.linalg.svdvals(orthogonalise(matrix[None])[0])
    assert 0.5 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert F.cosine_similarity(orthogonalise(matrix[None]).flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_moves_a_weight_by_the_stated_fraction_and_learns():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3, 3))
    target = weight.detach() + 0.3 * torch.randn(weight.shape)
    muon = Muon([weight], lr=0.01)
    losses, moved = [], []
    for _ in range(60):
        before = weight.detach().clone()
        loss = (weight - target).square().sum()
        muon.zero_grad()
        loss.backward()
        muon.step()
        losses.append(float(loss.detach()))
        moved.append(float((weight.detach() - before).norm() / before.norm()))
    assert moved == pytest.approx([0.01] * 60, rel=1e-3)
    assert losses[-1] < 0.5 * losses[0] and all(math.isfinite(loss) for loss in losses)
