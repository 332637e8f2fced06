"""A linear encoder is read off exactly, and any other is left as it is."""

import torch

from mive_core.embedded.synthetic import random_clip
from mive_core.embedded.vae_network import WholeClipVAE, encode_clips, read_whole_clip_vae
from mive_core.embedded.vae_patch_matrix import PatchMatrix, encoder_of
from mive_core.pipeline import EMBEDDED


@torch.inference_mode()
def test_the_embedded_encoder_as_one_matrix_gives_the_networks_latents():
    vae = read_whole_clip_vae(EMBEDDED["tiny"] / "vae.safetensors")
    clips = torch.stack([torch.from_numpy(random_clip(seed, (64, 48), 9)) for seed in range(4)])
    code = PatchMatrix.from_vae(vae)
    for frames in (clips, clips[:, :1]):
        expected = encode_clips(vae, frames)
        assert expected.std() > 0.5 and torch.allclose(code.encode(frames), expected, atol=2e-3)


@torch.inference_mode()
def test_an_encoder_with_live_branches_stays_the_network():
    torch.manual_seed(0)
    vae = WholeClipVAE(8)
    assert PatchMatrix.from_vae(vae) is None
    frames = torch.rand(1, 5, 16, 16, 3)
    assert torch.equal(encoder_of(vae)(frames), encode_clips(vae, frames))
