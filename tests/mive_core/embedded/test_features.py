"""Cached features equal what the pipeline computes, and are computed once."""

from dataclasses import replace

import pytest
import torch

from mive_core.config import PRESETS
from mive_core.embedded.dit_task import FeatureBatches
from mive_core.embedded.features import Bucket, compute, latents_of, object_of, read_shards, shards_of, states_of, wait, write_shards
from mive_core.embedded.synthetic import PairedEdits
from mive_core.embedded.vae_network import WholeClipVAE, read_whole_clip_vae
from mive_core.embedded.vae_patch_matrix import encoder_of
from mive_core.formats.safetensors_file import write_tensors
from mive_core.train.objective import EditFeatures, cauchy_loss, masked_mean
from mive_core.vae import VAE
from mive_core.vlm import VLM

CONFIG = replace(PRESETS["tiny"], layers=(1, 4))
BUCKET = Bucket((32, 32), 5, 3, 1.0)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    write_tensors(path, WholeClipVAE(8).state_dict(), {})
    return path


def shards(vae_file, vlm_folder, folder):
    return shards_of(BUCKET, vae=str(vae_file), vlm=str(vlm_folder), config=CONFIG, seed=4, folder=str(folder))


def test_latents_and_states_are_the_pipelines_own(vae_file, vlm_folder):
    pair = PairedEdits(4, "train", BUCKET.size, BUCKET.num_frames).sample(0).pair
    with torch.inference_mode():
        got, vae = latents_of(pair, encoder_of(read_whole_clip_vae(vae_file))), VAE.load(vae_file)
        for name, frames in (("target", pair.target), ("source", pair.request.source.frames), ("reference", pair.request.reference[None])):
            assert torch.allclose(got[name].float(), vae.encode(frames)[0], atol=5e-3)
        vlm = VLM.load(vlm_folder)
        states = states_of(pair, vlm, CONFIG)["states"]
        expected = vlm.condition(pair.request, CONFIG).states[0]
    assert states.dtype == torch.bfloat16 and torch.allclose(states.float(), expected, rtol=1e-2, atol=1e-2)


def test_keyframes_are_encoded_as_single_images(vae_file):
    pair = PairedEdits(4, "train", BUCKET.size, BUCKET.num_frames).sample(0).pair
    with torch.inference_mode():
        got, vae = latents_of(pair, encoder_of(read_whole_clip_vae(vae_file)), (2, 4)), VAE.load(vae_file)
        alone = latents_of(pair, encoder_of(read_whole_clip_vae(vae_file)))
    assert got["reference"].shape == (16, 3, 4, 4) and got["reference_frames"].tolist() == [0.0, 2.0, 4.0]
    assert alone["reference"].shape == (16, 1, 4, 4) and alone["reference_frames"].tolist() == [0.0]
    for position, image in enumerate((pair.request.reference, pair.target[2], pair.target[4])):
        assert torch.allclose(got["reference"][:, position].float(), vae.encode(image[None])[0, :, 0], atol=5e-3)


def test_features_of_an_unedited_clip_are_finite(vae_file):
    """Where nothing is asked the mask is zero everywhere, and the losses must not divide by its sum."""
    edit = PairedEdits(4, "train", BUCKET.size, BUCKET.num_frames, kinds=("nothing asked",)).sample(0)
    with torch.inference_mode():
        latents, objects = latents_of(edit.pair, encoder_of(read_whole_clip_vae(vae_file))), object_of(edit)
    assert not latents["mask"].any() and torch.equal(latents["source"], latents["target"])
    assert objects["shape"] == -1 and not objects["track"].any() and not objects["cover"].any()
    mask, error = latents["mask"][None].float(), torch.rand(1, *latents["mask"].shape)
    assert masked_mean(mask, error) == 0
    assert torch.isclose(cauchy_loss(mask, error, 4.0, 0.1), 0.1 * torch.log1p(error.mean() / 0.1))


def test_batches_hold_one_number_of_references(vae_file):
    zeros = torch.zeros(16, 2, 4, 4)
    entries = [
        EditFeatures(zeros, zeros, torch.zeros(16, num, 4, 4), torch.zeros(2, 5, 8), zeros[0], reference_frames=torch.arange(num)) for num in (1, 2, 1, 3, 2)
    ]
    batches = FeatureBatches([(BUCKET, entries)], 4, seed=0)
    drawn = [batches[step] for step in range(20)]
    assert {batch.reference.shape[2] for batch in drawn} == {1, 2, 3}
    assert all(batch.reference_frames.shape == (4, batch.reference.shape[2]) for batch in drawn)


def test_shards_are_computed_once_and_again_when_the_model_changes(vae_file, vlm_folder, tmp_path):
    jobs = shards(vae_file, vlm_folder, tmp_path / "f")
    for job in jobs:
        write_shards([job])
    entries = read_shards(jobs)
    assert (
        entries[0].reference_frames is not None
        and len(entries) == BUCKET.num_clips
        and entries[0].target.shape == (16, 2, 4, 4)
        and entries[0].states.shape[0] == 2
    )
    written = {job.path: job.path.stat().st_mtime_ns for job in jobs}
    (again,) = wait(compute([jobs], 1))
    assert torch.equal(again[2].states, entries[2].states)
    assert {job.path: job.path.stat().st_mtime_ns for job in jobs} == written
    other = vae_file.with_name("other.safetensors")
    state = WholeClipVAE(8).state_dict()
    write_tensors(other, state, {})
    for job in shards(other, vlm_folder, tmp_path / "f"):
        write_shards([job])
    changed = {job.path for job in jobs if job.path.stat().st_mtime_ns != written[job.path]}
    assert changed == {job.path for job in jobs if job.part == "latents"}


def test_a_decoder_that_learns_on_leaves_the_features_valid(vae_file, vlm_folder, tmp_path):
    state = read_whole_clip_vae(vae_file).state_dict()
    other = tmp_path / "vae.safetensors"
    write_tensors(other, {k: v + 1 if k.startswith("decoder.") else v for k, v in state.items()}, {})
    ours, theirs = (next(s for s in shards(path, vlm_folder, tmp_path) if s.part == "latents").fingerprint for path in (vae_file, other))
    assert ours == theirs
