import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from mive_core.bench.memory_counter import MemoryCounter
from mive_core.embedded.vae_network import WholeClipVAE, decode_clips, encode_clips
from mive_core.errors import UserError
from mive_core.pipeline import EMBEDDED
from mive_core.vae import LATENTS_MEAN, LATENTS_STD, VAE, use_rsqrt_norms


def random_network(dim: int = 4) -> WholeClipVAE:
    """Every weight non-zero, and the signal neither vanishes nor grows."""
    torch.manual_seed(dim)
    network = WholeClipVAE(dim)
    for name, parameter in network.named_parameters():
        spread = 0.3 if parameter.ndim == 1 or name.endswith("gamma") else parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape) * spread + (1.0 if name.endswith("gamma") else 0.0)
    return network


@pytest.fixture(scope="module")
def network():
    return random_network()


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(network.state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def vae(path):
    return VAE.load(path)


@torch.no_grad()
def test_the_training_network_equals_diffusers(network, vae):
    frames = torch.rand(2, 13, 32, 48, 3)
    latents = vae.encode(frames)
    assert latents.shape == (2, 16, 4, 4, 6) and latents.std() > 0.1
    torch.testing.assert_close(encode_clips(network, frames), latents, atol=1e-5, rtol=1e-5)
    decoded = vae.decode_batch(latents)
    assert decoded.shape == frames.shape and decoded.std() > 0.05
    torch.testing.assert_close(decode_clips(network, latents), decoded, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 5])
def test_short_clips_too(network, vae, num_frames):
    frames = torch.rand(1, num_frames, 16, 16, 3)
    latents = vae.encode(frames)
    torch.testing.assert_close(encode_clips(network, frames), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_clips(network, latents), vae.decode_batch(latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_planar_convolutions_equal_diffusers_own(network, vae):
    from diffusers import AutoencoderKLWan

    plain = AutoencoderKLWan(base_dim=4)
    plain.load_state_dict(vae.network.state_dict())
    frames = torch.rand(5, 16, 32, 3)
    torch.testing.assert_close(VAE(plain).encode(frames), vae.encode(frames), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(VAE(plain).decode(vae.encode(frames)), vae.decode(vae.encode(frames)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_causality(vae):
    frames = torch.rand(9, 16, 16, 3)
    changed = torch.cat([frames[:5], torch.rand(4, 16, 16, 3)])
    a, b = vae.encode(frames), vae.encode(changed)
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and not torch.allclose(a[:, :, 2], b[:, :, 2])
    assert torch.allclose(vae.encode(frames[:1])[:, :, 0], a[:, :, 0], atol=1e-6)
    mixed = torch.cat([a[:, :, :2], torch.randn_like(a[:, :, 2:])], dim=2)
    x, y = vae.decode(a), vae.decode(mixed)
    assert torch.equal(x[:5], y[:5]) and not torch.allclose(x[5:], y[5:])


@torch.no_grad()
def test_latents_are_normalised_by_wans_statistics(vae):
    frames = torch.rand(1, 16, 16, 3)
    raw = vae.network.encode(frames.permute(3, 0, 1, 2)[None] * 2 - 1).latent_dist.mean
    expected = (raw - torch.tensor(LATENTS_MEAN).view(1, -1, 1, 1, 1)) / torch.tensor(LATENTS_STD).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(vae.encode(frames), expected)
    assert vae.network.config.latents_mean == list(LATENTS_MEAN) and vae.network.config.latents_std == list(LATENTS_STD)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_files_compute_in_float32(network, vae, tmp_path, dtype):
    save_file({key: value.to(dtype) for key, value in network.state_dict().items()}, str(tmp_path / "half.safetensors"))
    frames = torch.rand(5, 16, 16, 3)
    latents = VAE.load(tmp_path / "half.safetensors").encode(frames)
    assert latents.dtype == torch.float32 and (latents - vae.encode(frames)).abs().max() < 0.1


@torch.no_grad()
def test_diffusers_layout_and_folders(vae, tmp_path):
    from diffusers import AutoencoderKLWan

    plain = AutoencoderKLWan(base_dim=4)
    plain.load_state_dict(vae.network.state_dict())
    plain.save_pretrained(tmp_path / "pipeline" / "vae")
    frames = torch.rand(5, 16, 16, 3)
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        assert torch.equal(VAE.load(place).encode(frames), vae.encode(frames))


@pytest.mark.parametrize(
    "shape, message",
    [
        ((6, 32, 32, 3), "4n.1.*keep the first 5"),
        ((4, 32, 32, 3), "keep the first 1"),
        ((0, 32, 32, 3), "4n.1"),
        ((5, 24, 32, 3), "32x24.*16"),
        ((5, 32, 0, 3), "16"),
        ((5, 32, 32, 4), "not video frames"),
        ((32, 32, 3), "not video frames"),
    ],
)
def test_frames_it_cannot_hold_are_refused(vae, shape, message):
    with pytest.raises(UserError, match=message):
        vae.encode(torch.zeros(shape))


def test_values_that_are_not_finite_are_refused(vae):
    frames, latents = torch.zeros(5, 16, 16, 3), torch.zeros(1, 16, 2, 2, 2)
    frames[2, 3, 4, 0], latents[0, 5, 1, 0, 0] = float("nan"), float("inf")
    with pytest.raises(UserError, match="finite"):
        vae.encode(frames)
    with pytest.raises(UserError, match="finite"):
        vae.decode(latents)


@pytest.mark.parametrize("shape", [(2, 16, 2, 2, 2), (1, 4, 2, 2, 2), (16, 2, 2, 2), (1, 16, 0, 2, 2)])
def test_what_is_not_one_clip_of_latents_is_refused(vae, shape):
    with pytest.raises(UserError, match="latents"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "key, message",
    [
        ("encoder.down.0.block.0.conv1.weight", "Stable Diffusion"),
        ("patch_embedding.weight", "Wan diffusion model"),
        ("encoder.downsamples.0.downsamples.0.residual.0.gamma", "Wan 2.2"),
        ("something.weight", "something.weight"),
    ],
)
def test_other_models_are_named(tmp_path, key, message):
    save_file({key: torch.zeros(2, 2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=f"not a Wan 2.1 VAE.*{message}"):
        VAE.load(tmp_path / "other.safetensors")


def test_a_vae_that_is_not_whole_is_refused(network, tmp_path):
    weights = network.state_dict()
    weights.pop("decoder.middle.1.proj.bias")
    save_file(weights, str(tmp_path / "part.safetensors"))
    with pytest.raises(UserError, match="not whole.*1 missing.*attentions.0.proj.bias"):
        VAE.load(tmp_path / "part.safetensors")
    weights = network.state_dict() | {"extra": torch.zeros(1)}
    save_file(weights, str(tmp_path / "more.safetensors"))
    with pytest.raises(UserError, match="extra"):
        VAE.load(tmp_path / "more.safetensors")


def test_other_latent_channels_are_refused(tmp_path):
    save_file(WholeClipVAE(4, latent_channels=8).state_dict(), str(tmp_path / "eight.safetensors"))
    with pytest.raises(UserError, match="8 latent channels"):
        VAE.load(tmp_path / "eight.safetensors")


def test_broken_and_missing_files_are_refused(path, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text(json.dumps({"a": 1}))
    for name, message in (("cut.safetensors", "truncated"), ("text.safetensors", "no safetensors file")):
        with pytest.raises(UserError, match=message):
            VAE.load(tmp_path / name)
    (tmp_path / "vae.pth").write_bytes(b"")
    for place, message in ((tmp_path / "vae.pth", "unsupported file type"), (tmp_path / "none", "no such"), (tmp_path, "cannot tell")):
        with pytest.raises(UserError, match=message):
            VAE.load(place)


def test_norms_by_a_reciprocal_root_equal_the_librarys():
    """On a CPU they replace F.normalize, which took a third of a decode."""
    torch.manual_seed(3)
    network = AutoencoderKLWan(base_dim=8).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    latents = torch.randn(1, 16, 3, 4, 6)
    expected = network.decode(latents, return_dict=False)[0]
    use_rsqrt_norms(network)
    assert (network.decode(latents, return_dict=False)[0] - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert torch.isfinite(network.decode(torch.zeros(1, 16, 1, 4, 6), return_dict=False)[0]).all()


@pytest.fixture(scope="module", params=["embedded", "random"])
def either(request, vae):
    """The embedded VAE, and a random one of another width."""
    return VAE.load(EMBEDDED["tiny"] / "vae.safetensors") if request.param == "embedded" else vae


@torch.inference_mode()
@pytest.mark.parametrize("num_latent_frames", [1, 2, 5])
def test_pieces_equal_the_librarys_whole_decode(either, num_latent_frames):
    """Two clips in turns, for an edit and its source are decoded side by side."""
    clips = torch.randn(2, 1, 16, num_latent_frames, 4, 6, generator=torch.Generator().manual_seed(num_latent_frames))
    decoded = list(zip(*(either.decode_pieces(clip) for clip in clips)))
    assert [len(piece) for piece, _ in decoded] == [1] + [4] * (num_latent_frames - 1)
    for clip, pieces in zip(clips, zip(*decoded)):
        whole = either.network.decode(clip * either.std + either.mean, return_dict=False)[0]
        assert (torch.cat(pieces) - (whole[0].permute(1, 2, 3, 0) + 1) / 2).abs().max() < 1e-5
        assert torch.equal(torch.cat(pieces), either.decode(clip))


@torch.inference_mode()
@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_encoding_equals_the_librarys(either, num_frames):
    frames = torch.rand(2, num_frames, 32, 48, 3)
    expected = either.network.encode(frames.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
    assert (either.encode(frames) - (expected - either.mean) / either.std).abs().max() < 1e-5


@torch.inference_mode()
def test_decoding_in_pieces_holds_no_more_for_a_longer_clip(vae):
    """But for the latents; the whole decode holds all frames."""
    peaks, clips = [], [torch.randn(1, 16, count, 4, 6) for count in (4, 24)]
    for decode in (lambda latents: [None for _ in vae.decode_pieces(latents)], vae.decode):
        for latents in clips:
            with MemoryCounter() as counter:
                decode(latents)
            peaks.append(counter.peak)
    latents, frames = (20 * size * 4 for size in (16 * 4 * 6, 4 * 3 * 32 * 48))  # bytes of what is longer
    assert peaks[1] - peaks[0] <= 4 * latents and peaks[3] - peaks[2] > frames
    assert peaks[1] < peaks[0] + 0.1 * frames * 4


@torch.inference_mode()
def test_pieces_are_refused_before_the_first_is_asked_for(vae):
    with pytest.raises(UserError, match="not the latents of one clip"):
        vae.decode_pieces(torch.zeros(2, 16, 1, 4, 6))
    with pytest.raises(UserError, match="the latents are not finite"):
        vae.decode_pieces(torch.full((1, 16, 1, 4, 6), torch.nan))
