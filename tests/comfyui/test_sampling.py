"""The MODEL among ComfyUI's own nodes, held against the library standing alone."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mive_core.flow import schedule
from mive_core.formats.quantize import quantize
from mive_core.reference import fix_first_frame
from mive_core.types import Clip, EditRequest, Keyframe

DIT, LORA, STEPS, TOLERANCE = "random.safetensors", "random.safetensors", 4, 1e-5


def settings(loaded, **changed) -> dict:
    own = dict(model=loaded.model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=11, steps=STEPS, cfg=1.0)
    return {**own, **changed}


def sample(pack, loaded, **changed) -> torch.Tensor:
    return pack.run("MiVESampler", **settings(loaded, **changed))[0]["samples"]


@torch.inference_mode()
def stock(loaded, shift: float = 3.0, **changed) -> torch.Tensor:
    """ModelSamplingSD3 and KSampler."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    import nodes

    given = settings(loaded, **changed)
    (model,) = ModelSamplingSD3().patch(given["model"], shift)
    return nodes.KSampler().sample(
        model, given["seed"], given["steps"], given["cfg"], "euler", "simple", given["positive"], given["negative"], given["latent"]
    )[0]["samples"]


def test_condition_equals_the_librarys(pack, loaded, pipeline, request_):
    states, values = loaded.positive[0]
    expected = pipeline.vlm.condition(request_, pipeline.config)
    assert values["mive_layers"] == expected.layers
    assert torch.equal(states, expected.states.movedim(1, 2).flatten(2))


def test_budgets_are_those_of_the_vlm(pack, loaded, pipeline, request_):
    """A long instruction and large pictures: MiVE Encode gave the tiny VLM 512 tokens of words and 4096 of video, where it was taught 48 and 512."""
    frames = torch.nn.functional.interpolate(request_.source.frames.movedim(-1, 1), (576, 576)).movedim(1, -1)
    request = EditRequest(Clip(frames, 8.0), frames[0], "make the red circle blue and the green square yellow " * 12)
    with pytest.warns(UserWarning, match="got 240 tokens, expected at most 48"):
        expected = pipeline.vlm.condition(request, pipeline.config)
    ((states, _),) = pack.run("MiVEEncode", vlm=loaded.vlm, instruction=request.instruction, fps=8.0, source=frames, reference=frames[:1])[0]
    assert torch.equal(states, expected.states.movedim(1, 2).flatten(2))
    ((more, _),) = pack.run("MiVEEncode", vlm=loaded.vlm, instruction=request.instruction, fps=8.0, source=frames, reference=frames[:1], max_video_tokens=1024)[
        0
    ]
    assert more.shape[1] > states.shape[1]


def test_latents_equal_the_librarys(loaded, pipeline, request_):
    expected = pipeline.encode(request_)
    values = loaded.positive[0][1]
    normalise = loaded.model.model.process_latent_in
    for name in ("source", "reference"):
        got = normalise(values[f"mive_{name}_latents"])
        assert (got - getattr(expected, name)).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_dit_equals_the_librarys(loaded, pipeline):
    torch.manual_seed(0)
    noisy, source, reference = torch.randn(2, 16, 5, 6, 8), torch.randn(2, 16, 5, 6, 8), torch.randn(2, 16, 2, 6, 8)
    condition, t, times = torch.randn(2, 30, pipeline.config.width), torch.tensor([0.3, 0.9]), torch.tensor([[0.0, 2.5], [0.0, 2.5]])
    expected = fix_first_frame(pipeline.dit(noisy, source, reference, condition, t, times), noisy, t, source, reference)
    got = loaded.model.model.diffusion_model(noisy, t, source=source, reference=reference, condition=condition, reference_times=times)
    assert expected.std() > 0.01
    assert (got - expected).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_keyframes_equal_the_librarys(pack, loaded, pipeline, request_):
    frames = request_.source.frames
    keyframes = (Keyframe(6, 1 - frames[6]), Keyframe(13, 1 - frames[13]))
    keyed = replace(request_, reference=1 - frames[0], keyframes=keyframes)
    latents, condition = pipeline.encode(keyed), pipeline.vlm.condition(keyed, pipeline.config)
    expected = pipeline.denoise(latents, [condition], schedule(STEPS, 3.0), 1.0, seed=11)
    encoded = pack.run("MiVEEncode", vlm=loaded.vlm, instruction=keyed.instruction, fps=8.0, source=frames, reference=keyed.reference)[0]
    size = {"width": frames.shape[2], "height": frames.shape[1], "length": len(frames)}
    pictures = {f"keyframe_{i}": keyframe.image[None] for i, keyframe in enumerate(reversed(keyframes))}
    positive, negative, latent = pack.run(
        "MiVEReferenceLatents",
        **dict(positive=encoded, negative=encoded, vae=loaded.vae, source=frames, reference=keyed.reference[None], **size),
        keyframes=pictures,
        keyframe_numbers="13, 6",
    )
    got = sample(pack, loaded, positive=positive, negative=negative, latent=latent, shift=3.0)
    assert (loaded.model.model.process_latent_in(got) - expected).abs().max() <= 10 * TOLERANCE
    assert not torch.allclose(got, sample(pack, loaded, shift=3.0), atol=0.01)


@torch.inference_mode()
def test_in_a_context_window_times_count_from_its_first_frame(loaded):
    """The first frame is fixed only where the clip begins, and a keyframe counts only in a window that holds it."""
    torch.manual_seed(0)
    noisy, source, references = torch.randn(1, 16, 5, 6, 8), torch.randn(1, 16, 5, 6, 8), torch.randn(1, 16, 2, 6, 8)
    condition, t = torch.randn(1, 30, loaded.model.model.config.width), torch.tensor([0.5])

    def velocity(reference, *times):
        model = loaded.model.model.diffusion_model
        return model(noisy, t, source=source, reference=reference, condition=condition, reference_times=torch.tensor([times]))

    begins, later = velocity(references, 0.0, 9.0), velocity(references, -4.0, 5.0)
    assert torch.equal(begins, velocity(references[:, :, :1], 0.0)) and torch.equal(later, velocity(references[:, :, :1], -4.0))
    assert torch.allclose(noisy[:, :, :1] - 0.5 * begins[:, :, :1], references[:, :, :1], atol=1e-5)
    assert torch.equal(begins[:, :, 1:], later[:, :, 1:]) and not torch.equal(begins[:, :, :1], later[:, :, :1])


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_frames_equal_the_librarys(pack, loaded, pipeline, request_, cfg):
    import nodes

    expected = pipeline.edit(request_, steps=STEPS, cfg=cfg, shift=3.0, seed=11).frames
    with torch.inference_mode():
        (got,) = nodes.VAEDecode().decode(loaded.vae, {"samples": sample(pack, loaded, cfg=cfg, shift=3.0)})
    assert got.shape == expected.shape and expected.std() > 0.01
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_one_node_equals_the_stock_chain(pack, loaded, cfg):
    assert torch.equal(sample(pack, loaded, cfg=cfg, shift=5.0), stock(loaded, shift=5.0, cfg=cfg))


def test_shift_is_the_checkpoints_own_where_none_is_given(pack, loaded, pipeline):
    assert torch.equal(sample(pack, loaded), sample(pack, loaded, shift=pipeline.config.shift))


@torch.inference_mode()
def test_custom_sampler_equals_ksampler(pack, loaded):
    from comfy_extras import nodes_custom_sampler as custom

    (guider,) = custom.CFGGuider.execute(loaded.model, loaded.positive, loaded.negative, 2.5).args
    (sigmas,) = custom.BasicScheduler.execute(loaded.model, "simple", STEPS, 1.0).args
    (euler,) = custom.KSamplerSelect.execute("euler").args
    got = custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(11), guider, euler, sigmas, loaded.latent).args[0]["samples"]
    assert torch.equal(got, sample(pack, loaded, cfg=2.5))


def test_same_seed_is_bit_identical(pack, loaded):
    first = sample(pack, loaded, cfg=2.5)
    assert torch.equal(first, sample(pack, loaded, cfg=2.5))
    assert not torch.equal(first, sample(pack, loaded, cfg=2.5, seed=12))


def test_batch_of_two_equals_two_runs(pack, loaded):
    import nodes

    (latent,) = nodes.RepeatLatentBatch().repeat(loaded.latent, 2)
    both = sample(pack, loaded, latent=latent, cfg=2.5)
    for index in range(2):
        (one,) = nodes.LatentFromBatch().frombatch({**latent, "batch_index": [0, 1]}, index, 1)
        assert (both[index] - sample(pack, loaded, latent=one, cfg=2.5)[0]).abs().max() <= TOLERANCE
    assert not torch.allclose(both[0], both[1])


def test_denoise_0_changes_nothing(pack, loaded):
    latent = {"samples": torch.randn_like(loaded.latent["samples"])}
    assert torch.equal(sample(pack, loaded, latent=latent, denoise=0.0), latent["samples"])


def test_condition_is_embedded_once(loaded, pack):
    calls = []
    hook = loaded.model.model.diffusion_model.context.register_forward_hook(lambda *_: calls.append(1))
    try:
        sample(pack, loaded, cfg=2.5)
    finally:
        hook.remove()
    assert len(calls) == 2  # positive and negative, not once a step


def test_lengths_differ_without_padding(loaded, pack):
    """The negative's sequence is shorter; the two must not be made equal by repeating tokens."""
    shapes = []
    dit = loaded.model.model.diffusion_model
    hook = dit.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(kwargs["condition"].shape)), with_kwargs=True)
    try:
        sample(pack, loaded, cfg=2.5, steps=1)
    finally:
        hook.remove()
    lengths = {loaded.positive[0][0].shape[1], loaded.negative[0][0].shape[1]}
    assert len(lengths) == 2 and {shape[1] for shape in shapes} == lengths


@torch.inference_mode()
def test_context_windows(pack, loaded, monkeypatch):
    """Each window sees its own part of the source and the whole reference."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    (model,) = WanContextWindowsManualNode.execute(loaded.model, 9, 5, "standard_static", 1, False, "pyramid", False).args
    seen = []
    dit = loaded.model.model.diffusion_model
    hook = dit.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0].shape[2], kwargs["source"], kwargs["reference"])), with_kwargs=True)
    try:
        windowed = sample(pack, loaded, model=model, steps=1)
    finally:
        hook.remove()
    assert windowed.isfinite().all() and windowed.shape == loaded.latent["samples"].shape
    source = loaded.model.model.process_latent_in(loaded.positive[0][1]["mive_source_latents"])
    assert [num for num, _, _ in seen] == [3, 4]  # the later window has its anchor frame in front
    assert torch.equal(seen[0][1], source[:, :, :3]) and torch.equal(seen[1][1], source[:, :, 1:])
    assert all(reference.shape[2] == 1 for _, _, reference in seen)


@pytest.fixture
def knows_nine_frames(loaded, monkeypatch):
    """The checkpoint as one that knows 9 frames: the clip's 17 make two stretches, latent frames 0 to 2 and 2 to 4."""
    model = loaded.model.model
    monkeypatch.setattr(model, "config", replace(model.config, edit_frames=9, keyframes=True))


def with_guides(conditioning, **changed) -> list:
    return [[states, {**values, **changed}] for states, values in conditioning]


@torch.inference_mode()
@pytest.mark.parametrize("cfg", [1.0, 2.5])
def test_a_clip_longer_than_the_checkpoint_knows_is_sampled_in_stretches(pack, loaded, knows_nine_frames, cfg):
    """Written out: the second stretch is a clip of its own whose reference is the first one's last latent frame."""
    source = loaded.positive[0][1]["mive_source_latents"]

    def part(first: int, last: int, **changed):
        guides = {"mive_source_latents": source[:, :, first:last], **changed}
        latent = {"samples": loaded.latent["samples"][:, :, first:last]}
        return sample(pack, loaded, positive=with_guides(loaded.positive, **guides), negative=with_guides(loaded.negative, **guides), latent=latent, cfg=cfg)

    begin = part(0, 3)
    rest = part(2, 5, mive_reference_latents=begin[:, :, -1:])
    assert torch.equal(sample(pack, loaded, cfg=cfg), torch.cat([begin, rest[:, :, 1:]], dim=2))
    assert not torch.equal(rest, part(2, 5))


@torch.inference_mode()
def test_in_stretches_keyframes_count_where_they_lie(pack, loaded, knows_nine_frames):
    seen = []
    pictures = loaded.positive[0][1]["mive_reference_latents"].repeat(1, 1, 4, 1, 1)
    keyed = with_guides(loaded.positive, mive_reference_frames=(0, 5, 8, 14), mive_reference_latents=pictures)
    hook = loaded.model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["reference_times"].tolist()), with_kwargs=True
    )
    try:
        result = sample(pack, loaded, positive=keyed, steps=1)
    finally:
        hook.remove()
    assert result.shape == loaded.latent["samples"].shape and result.isfinite().all()
    assert seen == [[[0.0, 1.625, 2.375]], [[0.0, 1.875]]]


@torch.inference_mode()
def test_stretches_of_a_batch_with_a_mask(pack, loaded, knows_nine_frames):
    """Each of the two continues its own first stretch; outside of the mask, which has frames, the latent is kept."""
    import nodes

    source = loaded.positive[0][1]["mive_source_latents"]
    mask = torch.zeros(1, 1, *source.shape[2:])
    mask[:, :, 1:, :, :4] = 1
    (both,) = nodes.RepeatLatentBatch().repeat({"samples": source, "noise_mask": mask}, 2)
    result = pack.run("MiVESampler", **settings(loaded, latent=both))[0]
    assert result["samples"].shape[0] == 2 and result["noise_mask"].shape[2] == source.shape[2]
    assert torch.allclose(result["samples"][:, :, :1], source[:, :, :1], atol=1e-5) and torch.allclose(result["samples"][..., 4:], source[..., 4:], atol=1e-5)
    assert not torch.allclose(result["samples"][0, :, 3:, :, :4], result["samples"][1, :, 3:, :, :4], atol=1e-3)


@torch.inference_mode()
def test_the_users_context_windows_go_before_stretches(pack, loaded, knows_nine_frames):
    """A keyframe's time counts from the frame that the core puts before a later window."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    (model,) = WanContextWindowsManualNode.execute(loaded.model, 9, 5, "standard_static", 1, False, "pyramid", False).args
    pictures, seen = loaded.positive[0][1]["mive_reference_latents"].repeat(1, 1, 2, 1, 1), []
    keyed = with_guides(loaded.positive, mive_reference_frames=(0, 14), mive_reference_latents=pictures)
    hook = loaded.model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[2], kwargs["reference_times"].tolist())), with_kwargs=True
    )
    try:
        sample(pack, loaded, model=model, positive=keyed, steps=1)
    finally:
        hook.remove()
    assert seen == [(3, [[0.0, 3.875]]), (4, [[-1.0, 2.875]])]


@torch.inference_mode()
def test_one_window_over_all_changes_nothing(pack, loaded):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    (model,) = WanContextWindowsManualNode.execute(loaded.model, 17, 5, "standard_static", 1, False, "pyramid", False).args
    assert torch.equal(sample(pack, loaded, model=model), sample(pack, loaded))


@torch.inference_mode()
def test_easycache_skips_steps(pack, loaded):
    from comfy_extras.nodes_easycache import EasyCacheNode

    calls = []
    (model,) = EasyCacheNode.execute(loaded.model, 5.0, 0.0, 1.0, False).args
    hook = loaded.model.model.diffusion_model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        result = sample(pack, loaded, model=model, steps=10)
    finally:
        hook.remove()
    assert result.isfinite().all() and 0 < len(calls) < 10


@torch.inference_mode()
def test_lora_on_shared_layers(pack, loaded):
    """A Wan LoRA lands on the layers MiVE shares with Wan, and comes off again."""
    import nodes

    (model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, LORA, 1.0)
    assert len(model.patches) == 2
    plain = sample(pack, loaded)
    assert (sample(pack, loaded, model=model) - plain).abs().max() > 1e-3
    assert torch.equal(sample(pack, loaded), plain)


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_storage(pack, loaded, dtype):
    (model,) = pack.run("MiVELoadDiT", model=DIT, weight_dtype=dtype)
    dit = model.model.diffusion_model
    assert dit.blocks[0].ffn[0].weight.dtype.itemsize == 1 and dit.blocks[0].modulation.dtype == torch.float32
    assert model.model_size() < 0.3 * loaded.model.model_size()
    plain, small = sample(pack, loaded), sample(pack, loaded, model=model)
    assert 0 < (small - plain).norm() / plain.norm() < 0.5


@torch.inference_mode()
def test_a_quantised_file_stays_in_8_bits_and_takes_a_lora(pack, loaded, base):
    """What `mive quantize` writes is ComfyUI's own layout: its quantised layers hold it, and nearly the same velocity comes out."""
    import nodes

    folder = base / "models" / "diffusion_models"
    quantize(folder / DIT, folder / "fp8_scaled.safetensors")
    (model,) = pack.run("MiVELoadDiT", model="fp8_scaled.safetensors")
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    assert layer.quant_format == "float8_e4m3fn" and layer.weight.shape == (576, 192)
    assert model.model_size() < 0.5 * loaded.model.model_size()
    plain, small = sample(pack, loaded), sample(pack, loaded, model=model)
    assert 0 < (small - plain).norm() / plain.norm() < 0.2
    (with_lora,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)
    assert (sample(pack, loaded, model=with_lora) - small).abs().max() > 1e-3
    assert torch.equal(sample(pack, loaded, model=model), small)


def test_memory_counts_the_whole_sequence(loaded):
    estimate = loaded.model.model.memory_required
    shape = list(loaded.latent["samples"].shape)
    alone, with_condition = estimate(shape), estimate(shape, {"condition": [[1, 100, 192]]})
    batch, _, frames, height, width = shape
    cells = (frames + 1) * height * width
    assert with_condition / alone == pytest.approx((cells + 400) / cells)
    assert estimate([2 * batch, *shape[1:]]) == pytest.approx(2 * alone, rel=0.03)  # all of a batch share the rotations


def test_checkpoint_survives_the_loading(loaded, base):
    """What ComfyUI holds is what the file says, key for key."""
    expected = load_file(base / "models" / "diffusion_models" / DIT)
    got = loaded.model.model.diffusion_model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
