"""Each node on its own: what it gives, and what it says to bad input."""

import json
import re
import shutil
from pathlib import Path

import pytest
import skimage.data
import torch
from safetensors.torch import load_file, save_file

from mive_core.cost.memory import vae_decode_bytes
from mive_core.media.fit import edit_size, resize, resize_and_crop

DIT, VLM = "random.safetensors", "Qwen3-VL-random"


def clip(num_frames: int = 17, height: int = 48, width: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.rand(num_frames, height, width, channels, generator=torch.Generator().manual_seed(1))


def still(num_frames: int, name: str = "astronaut", width: int = 64, height: int = 48) -> torch.Tensor:
    """A photograph as a clip."""
    photograph = torch.from_numpy(getattr(skimage.data, name)()).float()[None] / 255
    return resize_and_crop(photograph, (width, height)).expand(num_frames, -1, -1, -1)


def recoloured(frames: torch.Tensor) -> torch.Tensor:
    """A twentieth of the picture."""
    edited = frames.clone()
    edited[:, 20:32, 30:42] = edited[:, 20:32, 30:42, [2, 0, 1]] * 0.6
    return edited


def refused(pack, name: str, **inputs) -> str:
    """The message of the error that a node raises."""
    with pytest.raises(ValueError) as caught:
        pack.run(name, **inputs)
    assert type(caught.value).__name__ == "UserError", repr(caught.value)
    return str(caught.value)


def anywhere(conditioning: list) -> list:
    """Without what it was read from, so that it goes with any clip."""
    return [[states, {key: value for key, value in values.items() if key != "mive_read"}] for states, values in conditioning]


def guides(pack, loaded, **changed):
    inputs = dict(
        positive=anywhere(loaded.positive), negative=anywhere(loaded.negative), vae=loaded.vae, source=clip(), reference=clip(1), width=64, height=48, length=17
    )
    return {**inputs, **changed}


# Layer Select


@pytest.mark.parametrize("preset, layers", [("first + last (paper)", (1, 4)), ("first", (1,)), ("last", (4,))])
def test_layer_presets(pack, loaded, preset, layers):
    choice, text = pack.run("MiVELayerSelect", preset=preset, vlm=loaded.vlm)
    assert choice.resolve(4) == layers
    assert text == f"layers {', '.join(map(str, layers))} of 4 (Qwen3-VL-tiny)"


def test_evenly_spaced_layers(pack):
    choice, text = pack.run("MiVELayerSelect", preset="evenly spaced", count=4)
    assert choice.resolve(36) == (1, 13, 24, 36) and choice.resolve(4) == (1, 2, 3, 4) and text == "4 evenly spaced layers"


@pytest.mark.parametrize("spec, said", [("31..2", "column 1"), ("1,,2", "column 3"), ("", "column 1"), ("1e9", "column 1"), ("1,1", "column 3")])
def test_bad_specs_are_refused_when_the_prompt_is_checked(pack, spec, said):
    verdict = pack.node("MiVELayerSelect").validate_inputs(preset="custom", custom=spec)
    assert isinstance(verdict, str) and said in verdict
    assert pack.node("MiVELayerSelect").validate_inputs(preset="first", custom=spec) is True


def test_layers_that_the_vlm_lacks(pack, loaded):
    assert "no layer 99" in refused(pack, "MiVELayerSelect", preset="custom", custom="99", vlm=loaded.vlm)
    assert "got 9; expected at most 4" in refused(pack, "MiVELayerSelect", preset="evenly spaced", count=9, vlm=loaded.vlm)


# Encode


def encoded(pack, loaded, **changed):
    inputs = dict(vlm=loaded.vlm, source=clip(), reference=clip(1), instruction="make it blue", fps=8.0)
    return pack.run("MiVEEncode", **{**inputs, **changed})[0]


def test_chosen_layers_travel_with_their_numbers(pack, loaded):
    choice, _ = pack.run("MiVELayerSelect", preset="custom", custom="0:5")
    ((states, values),) = encoded(pack, loaded, layers=choice)
    assert values["mive_layers"] == (0, 1, 2, 3, 4) and states.shape[-1] == 5 * 128 and states.dtype == torch.float32


def test_instruction_may_be_anything(pack, loaded, caplog):
    for text in ("", "🎈 make the balloon blue", "اجعل السماء زرقاء", "把天空变成蓝色"):
        assert encoded(pack, loaded, instruction=text)[0][0].isfinite().all()
    inputs = dict(vlm=loaded.vlm, source=clip(), reference=clip(1), fps=8.0)
    assert "a lone surrogate at character 5" in refused(pack, "MiVEEncode", instruction="make \ud800", **inputs)
    caplog.clear()
    short = encoded(pack, loaded, instruction="blue " * 20000)
    assert "is ignored" in caplog.text and short[0][0].shape[1] < 2000


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"source": clip()[:0]}, "source: the clip holds 0 frames"),
        ({"reference": clip(2)}, "reference: one reference is needed; got 2 images"),
        ({"reference": clip(1, 1, 1)}, "reference: the picture's size is out of bounds; got 1x1"),
        ({"reference": clip(1, 20000, 16)}, "16x20000"),
        ({"source": clip().index_fill(0, torch.tensor(3), float("nan"))}, "NaN or infinite pixels; got frame 3"),
    ],
)
def test_bad_pictures(pack, loaded, changed, said):
    inputs = dict(vlm=loaded.vlm, source=clip(), reference=clip(1), instruction="", fps=8.0)
    assert said in refused(pack, "MiVEEncode", **{**inputs, **changed})
    assert said in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, **changed))


def test_mended_pictures_are_told_of(pack, loaded, caplog):
    encoded(pack, loaded, source=clip(channels=4))
    assert "transparent pixels are composited over black" in caplog.text
    encoded(pack, loaded, source=clip(channels=1))
    encoded(pack, loaded, source=clip() * 2)
    assert "clamped to 0..1" in caplog.text


def test_a_connected_model_says_what_to_read(pack, loaded, monkeypatch, caplog):
    """Its layers and budgets; other layers are noted, those that cannot fit are refused before the VLM runs."""
    from dataclasses import replace

    model, read = loaded.model.model, []
    condition = type(loaded.vlm).condition
    monkeypatch.setattr(
        type(loaded.vlm), "condition", lambda vlm, request, config, layers: read.append((config, layers)) or condition(vlm, request, config, layers)
    )

    def ask(spec: str | None = None, trained: tuple[int, ...] = (1, -1), **changed) -> None:
        monkeypatch.setattr(model, "config", replace(model.config, layers=trained, max_video_tokens=300, video_fps=4.0))
        chosen = {} if spec is None else {"layers": pack.run("MiVELayerSelect", preset="custom", custom=spec)[0]}
        encoded(pack, loaded, model=loaded.model, **chosen, **changed)

    ask(trained=(-1, 2))
    ask("1,-1", max_video_tokens=200)
    assert [(config.max_video_tokens, config.video_fps, layers) for config, layers in read] == [(300, 4.0, (4, 2)), (200, 4.0, (1, 4))] and not caplog.records
    ask("1,2")
    assert "layers 1, 2 are read by a DiT that was trained with layers 1, 4" in caplog.text
    monkeypatch.setattr(type(loaded.vlm), "condition", None)
    for spec, said in (
        ("-1,1", "another order than the DiT was trained with; got 2 (4, 1); expected 2 (1, 4)"),
        ("1,2,3", "got 3 (1, 2, 3); expected 2 (1, 4)"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            ask(spec)
    monkeypatch.setattr(model, "config", replace(model.config, vlm="Qwen3-VL-8B", vlm_width=4096, vlm_num_layers=36))
    assert "vlm: the DiT was made for another VLM; got Qwen3-VL-tiny of width 128, 4 layers; expected Qwen3-VL-8B of width 4096" in refused(
        pack, "MiVEEncode", vlm=loaded.vlm, source=clip(), reference=clip(1), instruction="", fps=8.0, model=loaded.model
    )


# Reference Latents and the sampler


def test_another_vae_is_refused(pack, loaded):
    """A picture's VAE takes the frames for a batch of pictures and gives latents of four channels."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    torch.manual_seed(4)
    weights = {key: torch.randn(value.shape) * 0.05 for key, value in TAESD().state_dict().items()}
    other = comfy.sd.VAE(sd={**weights, "vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)})
    assert "vae: this is not a Wan 2.1 VAE; got latents of shape (17, 4, 6, 8)" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, vae=other))


def test_short_clips_are_refused_with_both_counts(pack, loaded):
    assert "got 17 frames; expected 33; ask for 17 or fewer" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, length=33))


def test_sizes_that_do_not_fit_are_refused_with_those_that_do(pack, loaded):
    assert "got 16; expected 13 or 17" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, length=16))
    assert "got 60x48; expected 64x48" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, width=60))


def test_0_is_the_sources_own_size_and_length(pack, loaded):
    positive, _, latent = pack.run(
        "MiVEReferenceLatents", **guides(pack, loaded, source=clip(16, 50, 70), reference=clip(1, 50, 70), width=0, height=0, length=0)
    )
    assert latent["samples"].shape == (1, 16, 4, 6, 8) and positive[0][1]["mive_reference_latents"].shape == (1, 16, 1, 6, 8)
    *_, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, width=32, height=0, length=0))
    assert latent["samples"].shape == (1, 16, 5, 6, 4)


def test_nearly_the_same_shape_is_scaled_whole(pack, loaded, monkeypatch):
    """Source, reference, keyframe and mask alike, so that they keep lying over one another; other shapes are cropped."""
    seen = []
    encode = pack.submodule("nodes.latents").encode
    monkeypatch.setattr(pack.submodule("nodes.latents"), "encode", lambda vae, frames: seen.append(frames) or encode(vae, frames))
    wide = clip(1, 48, 66).expand(17, -1, -1, -1)
    mask = torch.zeros(1, 48, 66)
    mask[:, :, :1] = 1
    keyed = dict(keyframes={"keyframe_0": wide[:1]}, keyframe_numbers="4", mask=mask)
    *_, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, source=wide, reference=wide[:1], **keyed))
    assert len(seen) == 3 and all(torch.equal(frames[0], resize(wide[0], (64, 48))) for frames in seen)
    assert latent["noise_mask"][0, 0, 0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # cropped, the column would be gone
    seen.clear()
    pack.run("MiVEReferenceLatents", **guides(pack, loaded, source=clip(1, 48, 72).expand(17, -1, -1, -1)))
    assert torch.equal(seen[1][0], clip(1, 48, 72)[0, :, 4:68])


def test_one_frame_works(pack, loaded):
    positive, negative, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, source=clip(1), length=1))
    assert latent["samples"].shape == (1, 16, 1, 6, 8)
    (result,) = pack.run("MiVESampler", model=loaded.model, positive=positive, negative=negative, latent=latent, steps=1)
    assert result["samples"].isfinite().all()


@pytest.mark.parametrize(
    "read, edited, said",
    [
        ({"source": still(33)}, {"length": 17}, "positive: MiVE Encode has read another number of frames than are to be edited; got 33 read, 17 to edit"),
        ({"reference": still(1)}, {"reference": still(1, "coffee")}, "positive: MiVE Encode has read another reference; got pictures that differ by"),
        ({"source": still(17, "coffee")}, {}, "positive: MiVE Encode has read another source; got pictures that differ by"),
        ({"source": still(17, "coffee", 192, 96)}, {}, "positive: MiVE Encode has read another source; got pictures that differ by"),
        ({"reference": recoloured(still(1))}, {}, "positive: MiVE Encode has read another reference"),
    ],
    ids=["frames", "reference", "source", "source of another shape", "reference with one small edit"],
)
def test_both_nodes_get_the_same_clip(pack, loaded, read, edited, said):
    """Also the negative conditioning, where it was made from another one."""
    same = {"source": still(17), "reference": still(1)}
    right, wrong = (encoded(pack, loaded, **{**same, **changed}) for changed in ({}, read))
    inputs = guides(pack, loaded, **{**same, **edited, "vae": None})  # the VAE would fail, had it been reached
    assert said in refused(pack, "MiVEReferenceLatents", **{**inputs, "positive": wrong, "negative": right})
    if not edited:
        assert said.replace("positive", "negative") in refused(pack, "MiVEReferenceLatents", **{**inputs, "positive": right, "negative": wrong})


@pytest.mark.parametrize("size", [(64, 48), (192, 128), (80, 96), (128, 64)], ids=lambda size: "x".join(map(str, size)))
def test_sizes_and_crops_do_not_make_another_clip(pack, loaded, size):
    """Encode reads the whole frames at their own size; here they are scaled, or cropped to another shape."""
    whole = {"source": still(17, "astronaut", 190, 126), "reference": still(1, "astronaut", 380, 252)}
    positive = encoded(pack, loaded, **whole)
    fitted, *_ = pack.run("MiVEPreflight", video=whole["source"], width=size[0], height=size[1])
    for source in (whole["source"], fitted):
        inputs = guides(pack, loaded, positive=positive, negative=positive, **{**whole, "source": source}, width=size[0], height=size[1])
        *_, latent = pack.run("MiVEReferenceLatents", **inputs)
        assert latent["samples"].shape[3:] == (size[1] // 8, size[0] // 8)


def shown(pack, name: str, **inputs) -> str:
    """The text that a node returns for itself, beside its outputs."""
    node = pack.node(name)
    defaults = {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None) is not None}
    with torch.inference_mode():
        return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**{**defaults, **inputs}).ui["text"][0]


def test_a_reference_of_something_else_is_told_of_on_the_node(pack, loaded, caplog):
    source = still(17, "astronaut", 192, 112)
    told = "reference: it has nothing in common with the source's first frame"
    inputs = guides(pack, loaded, source=source, width=0, height=0)
    assert told in shown(pack, "MiVEReferenceLatents", **{**inputs, "reference": still(1, "coffee", 192, 112)}) and told in caplog.text
    caplog.clear()
    night = source[:1].pow(1.8) * torch.tensor([0.1, 0.16, 0.35])
    assert shown(pack, "MiVEReferenceLatents", **{**inputs, "reference": night}) == "" and not caplog.records
    keyed = dict(keyframes={"keyframe_0": still(1, "coffee", 192, 112)}, keyframe_numbers="12")
    assert told.replace("reference: ", "keyframe 12: ").replace("first frame", "frame 12") in shown(
        pack, "MiVEReferenceLatents", **{**inputs, **keyed, "reference": night}
    )


def test_swapped_source_and_reference(pack, loaded):
    swapped = {"source": clip(1), "reference": clip(17)}
    for name, inputs in (("MiVEEncode", dict(vlm=loaded.vlm, instruction="", fps=8.0)), ("MiVEReferenceLatents", guides(pack, loaded))):
        assert "source and reference look swapped; got a source of 1 frame, 17 references" in refused(pack, name, **{**inputs, **swapped})


def test_without_a_mask_the_latent_is_empty(pack, loaded):
    *_, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded))
    assert latent.keys() == {"samples"} and latent["samples"].shape == (1, 16, 5, 6, 8) and not latent["samples"].any()


@torch.inference_mode()
def test_outside_of_the_mask_the_sampled_latent_is_the_sources(pack, loaded):
    """With our sampler and the stock one, for one mask and for one per frame; also after Repeat Latent Batch."""
    import nodes

    mask = torch.zeros(17, 48, 64)
    mask[:, :, :32] = 1
    for masks in (mask[:1], mask):
        positive, negative, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, mask=masks))
        source = positive[0][1]["mive_source_latents"]
        assert torch.equal(latent["samples"], source) and latent["noise_mask"].shape == (1, 1, 5, 6, 8)
        assert latent["noise_mask"][..., :4].eq(1).all() and not latent["noise_mask"][..., 4:].any()
        (ours,) = pack.run("MiVESampler", model=loaded.model, positive=positive, negative=negative, latent=latent, steps=2)
        (twice,) = nodes.RepeatLatentBatch().repeat(latent, 2)
        (stock,) = nodes.KSampler().sample(loaded.model, 0, 2, 1.0, "euler", "simple", positive, negative, twice)
        for sampled in (ours["samples"], *stock["samples"].split(1)):
            torch.testing.assert_close(sampled[..., 4:], source[..., 4:], atol=1e-5, rtol=1e-5)
            assert (sampled[..., :4] - source[..., :4]).abs().mean() > 0.1


@pytest.mark.parametrize(
    "frame, row, column, touched", [(0, 0, 0, (0, 0, 0)), (1, 7, 8, (1, 0, 1)), (4, 8, 7, (1, 1, 0)), (5, 47, 63, (2, 5, 7)), (16, 24, 32, (4, 3, 4))]
)
def test_a_latent_cell_is_edited_if_the_mask_touches_it(pack, loaded, frame, row, column, touched):
    mask = torch.zeros(17, 48, 64)
    mask[frame, row, column] = 1
    *_, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, mask=mask))
    assert latent["noise_mask"][0, 0].nonzero().tolist() == [list(touched)]


def test_the_mask_is_cropped_like_the_source(pack, loaded):
    """A source twice as wide loses a quarter at each side; a mask of another size, and one with more frames, too."""
    mask = torch.zeros(1, 48, 128)
    mask[:, :, 40:96] = 1
    for masks in (mask, mask[:, ::2, ::2], mask.expand(20, -1, -1)):
        *_, latent = pack.run("MiVEReferenceLatents", **guides(pack, loaded, source=clip(20, 48, 128), mask=masks))
        assert latent["noise_mask"][0, 0, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_bad_masks_of_reference_latents(pack, loaded, caplog):
    assert "mask: the mask does not fit the clip; got 16 masks; expected 1 or 17" in refused(
        pack, "MiVEReferenceLatents", **guides(pack, loaded, mask=torch.ones(16, 48, 64))
    )
    broken = torch.full((1, 48, 64), float("nan"))
    assert "mask: NaN or infinite values" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, mask=broken))
    caplog.clear()
    pack.run("MiVEReferenceLatents", **guides(pack, loaded, mask=torch.zeros(1, 48, 64)))
    assert "the mask is empty" in caplog.text


@pytest.mark.parametrize(
    "num_images, numbers, said",
    [
        (1, "", "each keyframe needs the number of its frame; got 1 images, 0 numbers"),
        (1, "4, 8", "got 1 images, 2 numbers"),
        (1, "last", "these are no numbers of frames; got 'last'"),
        (1, "17", "a keyframe lies outside of the clip; got frame 17; expected 1 to 16"),
        (1, "0", "frame 0 is the reference"),
        (2, "4, 4", "two keyframes for one frame; got frame 4"),
    ],
)
def test_bad_keyframes(pack, loaded, num_images, numbers, said):
    pictures = {f"keyframe_{i}": clip(1) for i in range(num_images)}
    assert said in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, keyframes=pictures, keyframe_numbers=numbers))


def test_a_keyframe_of_another_size_is_fitted(pack, loaded):
    keyed = guides(pack, loaded, keyframes={"keyframe_0": clip(1, 96, 128), "keyframe_1": None}, keyframe_numbers="12")
    positive, negative, _ = pack.run("MiVEReferenceLatents", **keyed)
    for conditioning in (positive, negative):
        assert conditioning[0][1]["mive_reference_latents"].shape == (1, 16, 2, 6, 8) and conditioning[0][1]["mive_reference_frames"] == (0, 12)


def test_an_untaught_dit_refuses_keyframes_before_it_samples(pack, loaded, monkeypatch):
    from dataclasses import replace

    keyed = guides(pack, loaded, keyframes={"keyframe_0": clip(1)}, keyframe_numbers="12")
    positive, negative, latent = pack.run("MiVEReferenceLatents", **keyed)
    monkeypatch.setattr(loaded.model.model, "config", replace(loaded.model.model.config, keyframes=False))
    assert "was not taught keyframes" in refused(pack, "MiVESampler", **sampler(loaded, positive=positive, negative=negative, latent=latent))


def sampler(loaded, **changed) -> dict:
    return {**dict(model=loaded.model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, steps=1), **changed}


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"cfg": float("nan")}, "cfg: the guidance scale must be a number; got nan"),
        ({"shift": float("inf")}, "shift: the timestep shift must be a positive number; got inf"),
        ({"latent": {"samples": torch.zeros(1, 16, 3, 6, 8)}}, "source latents of 5 x 6 x 8 (frames x rows x columns), a latent of 3 x 6 x 8"),
        ({"latent": {"samples": torch.zeros(1, 16, 5, 8, 8)}}, "a latent of 5 x 8 x 8"),
        ({"latent": {"samples": torch.zeros(1, 4, 64, 64)}}, "latent: this is the latent of an image; got shape (1, 4, 64, 64)"),
    ],
)
def test_bad_settings_of_the_sampler(pack, loaded, changed, said):
    assert said in refused(pack, "MiVESampler", **sampler(loaded, **changed))


def test_foreign_wires_are_named(pack, loaded):
    from comfy.model_patcher import ModelPatcher

    text = [[torch.zeros(1, 77, 768), {"pooled_output": None}]]
    assert "expected the output of the MiVE Encode node" in refused(pack, "MiVESampler", **sampler(loaded, positive=text))
    assert "positive: this conditioning was not made for MiVE" in refused(pack, "MiVEReferenceLatents", **guides(pack, loaded, positive=text))
    unguided = [[loaded.positive[0][0], {k: v for k, v in loaded.positive[0][1].items() if "latents" not in k}]]
    assert "the conditioning has no source and no reference; put the MiVE Reference Latents node" in refused(
        pack, "MiVESampler", **sampler(loaded, positive=unguided)
    )
    other = ModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu"))
    assert "this MODEL is not MiVE's; got Linear" in refused(pack, "MiVESampler", **sampler(loaded, model=other))


def test_another_number_of_layers_or_width(pack, loaded):
    states, values = loaded.positive[0]
    three = [[states[..., :1].expand(-1, -1, 3 * 128), {**values, "mive_layers": (1, 2, 4)}]]
    swapped = [[states, {**values, "mive_layers": (4, 1)}]]
    assert "another order than the DiT was trained with; got 2 (4, 1); expected 2 (1, 4)" in refused(pack, "MiVESampler", **sampler(loaded, positive=swapped))
    assert "got 3 (1, 2, 4); expected 2 (1, 4)" in refused(pack, "MiVESampler", **sampler(loaded, positive=three))
    wide = [[states.repeat(1, 1, 2), values]]
    assert "got Qwen3-VL-tiny of width 256; expected Qwen3-VL-tiny of width 128" in refused(pack, "MiVESampler", **sampler(loaded, positive=wide))


def test_other_layers_are_told_of_by_the_sampler_too(pack, loaded, caplog):
    """Where no model was connected to MiVE Encode."""
    states, values = loaded.positive[0]
    pack.run("MiVESampler", **sampler(loaded))
    assert not caplog.records
    pack.run("MiVESampler", **sampler(loaded, positive=[[states, {**values, "mive_layers": (1, 2)}]]))
    assert "layers 1, 2 are read by a DiT that was trained with layers 1, 4" in caplog.text


@torch.inference_mode()
def test_the_stock_sampler_says_the_same(loaded):
    """No node of ours stands between: the MODEL itself refuses, before its weights are loaded."""
    import nodes

    text = [[torch.zeros(1, 77, 768), {"pooled_output": None}]]
    with pytest.raises(ValueError, match="this conditioning was not made for MiVE"):
        nodes.KSampler().sample(loaded.model, 0, 1, 1.0, "euler", "simple", text, text, loaded.latent)
    with pytest.raises(ValueError, match="a latent of 3 x 6 x 8"):
        nodes.KSampler().sample(loaded.model, 0, 1, 1.0, "euler", "simple", loaded.positive, loaded.negative, {"samples": torch.zeros(1, 16, 3, 6, 8)})


# Loaders


def test_missing_files_are_refused_with_the_folder(pack):
    for name, folder in (("MiVELoadDiT", "models/diffusion_models"), ("MiVELoadVLM", "models/text_encoders")):
        for model in ("gone.safetensors", "../secret.safetensors", "/etc/passwd", "C:\\x.safetensors", "a\0b"):
            verdict = pack.node(name).validate_inputs(model=model)
            assert isinstance(verdict, str) and folder in verdict
        assert folder in refused(pack, name, model="gone.safetensors")


def test_wrong_files_are_named(pack, base):
    folder = base / "models" / "diffusion_models"
    whole = (folder / DIT).read_bytes()
    cases = {
        "vae": ((base / "models" / "vae" / "random.safetensors").read_bytes(), "this looks like a Wan VAE"),
        "vlm": ((base / "models" / "text_encoders" / VLM / "model.safetensors").read_bytes(), "this looks like a Qwen3-VL model"),
        "lora": ((base / "models" / "loras" / "random.safetensors").read_bytes(), "this looks like a LoRA"),
        "truncated": (whole[:-1000], f"got {len(whole) - 1000} bytes; expected {len(whole)} bytes"),
        "page": (b"<!DOCTYPE html><html></html>", "this is a web page"),
        "zip": (b"PK\x03\x04" + bytes(600), "this is a zip archive or a pickle"),
        "empty": (b"", "this is no safetensors file"),
    }
    for name, (content, said) in cases.items():
        (folder / f"{name}.safetensors").write_bytes(content)
        assert said in refused(pack, "MiVELoadDiT", model=f"{name}.safetensors")
        (folder / f"{name}.safetensors").unlink()


@pytest.mark.parametrize("added, said", [("blocks.0.cross_attn.q.weight", "a Wan T2V checkpoint"), ("img_emb.proj.0.weight", "a Wan I2V checkpoint")])
def test_wan_is_named(pack, base, added, said):
    """With the keys it lacks; for a T2V also the node that converts it, which an I2V cannot be."""
    path = base / "models" / "diffusion_models" / "wan.safetensors"
    state = {k: v for k, v in load_file(base / "models" / "diffusion_models" / DIT).items() if not k.startswith("context.")}
    save_file({**state, added: torch.zeros(1)}, path)
    message = refused(pack, "MiVELoadDiT", model=path.name)
    assert f"this looks like {said}" in message and "no context.fuse.weight" in message
    assert ("the MiVE Init From Wan node" in message) == ("T2V" in said)
    path.unlink()


def test_pickles_are_not_offered(pack, base):
    path = base / "models" / "diffusion_models" / "old.ckpt"
    path.write_bytes(b"\x80\x02")
    assert isinstance(pack.node("MiVELoadDiT").validate_inputs(model="old.ckpt"), str)
    path.unlink()


def test_damaged_vlm_folders(pack, base):
    folder = base / "models" / "text_encoders" / "broken"
    shutil.copytree(base / "models" / "text_encoders" / VLM, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refused(pack, "MiVELoadVLM", model="broken")
    weights.unlink()
    assert "no model.safetensors" in refused(pack, "MiVELoadVLM", model="broken")
    shards = {"model-00001-of-00002.safetensors": True, "model-00002-of-00002.safetensors": False}
    whole = load_file(base / "models" / "text_encoders" / VLM / "model.safetensors")
    home = {key: next(name for name, first in shards.items() if first == (index % 2 == 0)) for index, key in enumerate(whole)}
    for name in shards:
        save_file({key: value for key, value in whole.items() if home[key] == name}, folder / name, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    assert pack.run("MiVELoadVLM", model="broken")[0].vlm.num_layers == 4
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-100])
    message = refused(pack, "MiVELoadVLM", model="broken")
    assert second.name in message and "truncated" in message
    second.unlink()
    assert f"a shard is missing; got no {second.name}" in refused(pack, "MiVELoadVLM", model="broken")
    shutil.rmtree(folder)


def test_vlm_is_managed(pack, loaded):
    """The matrices can stay behind and are cast where they are used; the states do not change by it."""
    import comfy.model_management

    body = loaded.vlm.patcher.model.model
    linear = body.language_model.layers[0].self_attn.q_proj
    assert linear.comfy_cast_weights and body.language_model.embed_tokens.comfy_cast_weights
    before = encoded(pack, loaded)[0][0]
    assert loaded.vlm.patcher in [m.model for m in comfy.model_management.current_loaded_models]
    comfy.model_management.unload_all_models()
    assert torch.equal(encoded(pack, loaded)[0][0], before)


def test_embedded_files_are_offered(pack):
    """Those that are there: the VAE in the stock loader's list, the others in ours."""
    import nodes

    assets = Path(pack.base / "custom_nodes" / "mive" / "mive_core" / "assets" / "tiny")
    paths = pack.submodule("nodes.bridge.paths")
    for name, offered in (("vae.safetensors", nodes.VAELoader.vae_list(nodes.VAELoader)), ("dit.safetensors", paths.list_dits()), ("vlm", paths.list_vlms())):
        assert (f"tiny/{name}" in offered) == (assets / name).exists(), name


def test_load_vae_offers_only_vaes(pack):
    """Load VAE once listed the embedded DiT and VLM too, and took the DiT as its default."""
    import folder_paths

    import nodes

    offered = [name for name in nodes.VAELoader.vae_list(nodes.VAELoader) if name.startswith("tiny")]
    assert offered == ["tiny/vae.safetensors"]
    copy = Path(folder_paths.get_full_path("vae", offered[0]))
    assert pack.base in copy.parents
    expected = copy.read_bytes()
    copy.write_bytes(b"the file of an older version")
    pack.submodule("nodes.bridge.paths").register()
    assert copy.read_bytes() == expected and [path.name for path in copy.parent.iterdir()] == ["vae.safetensors"]


# Preflight and drift


def test_preflight_trims_and_pads(pack, caplog):
    video, width, height, length, report = pack.run("MiVEPreflight", video=clip(16, 50, 70))
    assert (width, height, length) == (64, 48, 13) and video.shape == (13, 48, 64, 3)
    assert "trimmed to 13" in report and "70x50 is scaled to 64x48" in report and "tokens: 48 target, 12 reference" in report
    video, *_, length, report = pack.run("MiVEPreflight", video=clip(16), policy="pad")
    assert length == 17 and torch.equal(video[16], video[15]) and "17 frames: the model takes 4n+1; padded by 1 frames" in report


def test_preflight_takes_size_and_length(pack):
    _video, width, height, length, _ = pack.run("MiVEPreflight", video=clip(17), width=32, height=0, length=9)
    assert (width, height, length) == (32, 48, 9)
    assert "got 40x48; expected 48x48" in refused(pack, "MiVEPreflight", video=clip(17), width=40)
    assert "0 frames" in refused(pack, "MiVEPreflight", video=clip(17)[:0])


def test_preflight_scales_to_what_the_model_knows(pack, loaded):
    """As `mive edit` does: whole, in nearly the source's shape. What is smaller stays, and an explicit size counts."""
    frames = clip(5, 180, 320)
    video, width, height, length, report = pack.run("MiVEPreflight", video=frames, model=loaded.model)
    assert (width, height, length) == (*edit_size((320, 180), 160 * 96), 5) == (144, 80, 5)
    torch.testing.assert_close(video, torch.stack([resize(frame, (144, 80)) for frame in frames]))
    assert "320x180 is scaled to 144x80: the model knows frames of about 15360 pixels best" in report
    assert pack.run("MiVEPreflight", video=frames)[1:3] == (320, 176)
    assert pack.run("MiVEPreflight", video=clip(), model=loaded.model)[1:3] == (64, 48)
    *sizes, _, report = pack.run("MiVEPreflight", video=frames, model=loaded.model, width=192, height=192)
    assert sizes[1:] == [192, 192] and "320x180 is scaled and cropped at the centre to 192x192: as asked" in report


def test_preflight_states_the_samplers_number_of_steps(pack, loaded, monkeypatch):
    import nodes

    asked = []
    monkeypatch.setattr(nodes, "common_ksampler", lambda model, seed, steps, *rest: asked.append(steps) or ({},))
    pack.run("MiVESampler", **{**sampler(loaded), "steps": 0})
    report = pack.run("MiVEPreflight", video=clip(), model=loaded.model)[-1]
    assert asked == [4] and "s for 4 steps (the model's own number)" in report
    assert "steps" not in pack.run("MiVEPreflight", video=clip())[-1]


def test_preflight_counts_the_models_cost(pack, loaded):
    report = pack.run("MiVEPreflight", video=clip(), model=loaded.model, steps=6)[-1]
    assert "of weights" in report and "s for 6 steps (the number set here)" in report
    num_frames, height, width, _ = clip().shape
    assert (
        f"to decode with Wan's VAE {vae_decode_bytes(num_frames, height, width, 2) / 2**20:.0f} MB whole" in report
        and "beside Qwen3-VL-tiny's weights" in report
    )


def test_preflight_counts_one_stretch_of_a_long_video(pack, loaded):
    *_, length, report = pack.run("MiVEPreflight", video=still(41), model=loaded.model)
    assert length == 41 and "the model knows 33 frames: MiVE Edit Video edits 2 stretches of at most 21" in report
    costs = [line for line in pack.run("MiVEPreflight", video=still(21), model=loaded.model)[-1].splitlines() if line.startswith(("tokens", "before"))]
    assert len(costs) == 2 and set(costs) <= set(report.splitlines())


def test_drift_report(pack):
    source = clip()
    edited = source.clone()
    edited[:, :24] += 0.1
    edited = edited.clamp(0, 1)
    mask = torch.zeros(1, 48, 64)
    mask[:, :24] = 1
    plot, report = pack.run("MiVEDriftReport", source=source, edited=edited, mask=mask)
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and "changes by 0.00 on average" in report
    _, report = pack.run("MiVEDriftReport", source=source, edited=edited)
    assert "changes by 0.00" not in report
    assert "got 13 frames of 64x48; expected 17 frames of 64x48" in refused(pack, "MiVEDriftReport", source=source, edited=edited[:13])


def test_one_file_is_read_with_comfyuis_tokenizer(pack, base, body, request_):
    """A repack as users have it lies in models/text_encoders; other files there are not offered."""
    folder = base / "models" / "text_encoders"
    save_file({f"model.{key}": value for key, value in body.state_dict().items()}, folder / "qwen3vl_bf16.safetensors")
    save_file({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}, folder / "t5.safetensors")
    offered = pack.submodule("nodes.bridge.paths").list_vlms()
    assert "qwen3vl_bf16.safetensors" in offered and "t5.safetensors" not in offered
    (vlm,) = pack.run("MiVELoadVLM", model="qwen3vl_bf16.safetensors", dtype="fp32")
    (conditioning,) = pack.run(
        "MiVEEncode", vlm=vlm, instruction=request_.instruction, fps=8.0, source=request_.source.frames, reference=request_.reference[None]
    )
    states, values = conditioning[0]
    assert values["mive_layers"] == (1, 2) and states.shape[2] == 2 * 64 and states.isfinite().all()


# Init From Wan


@pytest.fixture
def wan(pack):
    """A Wan T2V checkpoint of random numbers, two blocks of the narrowest head, as ComfyUI's own model names its weights."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    torch.manual_seed(2)
    model = WanModel(
        dim=128,
        ffn_dim=256,
        freq_dim=32,
        text_dim=16,
        in_dim=16,
        out_dim=16,
        num_heads=1,
        num_layers=2,
        model_type="t2v",
        device="cpu",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    state = {key: torch.randn(value.shape) * 0.05 for key, value in model.state_dict().items()}
    folder = pack.base / "models" / "diffusion_models"
    save_file(state, folder / "wan_t2v.safetensors")
    yield state
    (folder / "wan_t2v.safetensors").unlink()


def test_a_wan_file_becomes_one_that_mive_loads(pack, wan, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, total=None, preview=None: shown.append((value, total)))
    (name,) = pack.run("MiVEInitFromWan", model="wan_t2v.safetensors", filename="mive_from_wan.safetensors", vlm="2b", layers="first+last")
    (model,) = pack.run("MiVELoadDiT", model=name)
    got = model.model.diffusion_model.state_dict()
    shared = [key for key in got if key in wan and key != "patch_embedding.weight"]
    assert len(shared) > 30 and all(torch.equal(got[key], wan[key]) for key in shared)
    assert torch.equal(got["patch_embedding.weight"][:, :16], wan["patch_embedding.weight"]) and not got["patch_embedding.weight"][:, 16:].any()
    assert (model.model.config.vlm, model.model.config.vlm_width, model.model.config.resolved_layers) == ("Qwen3-VL-2B", 2048, (1, 28))
    assert shown[0] == (0, len(got)) and shown[-1] == (len(got) - 1, len(got))
    assert "there already" in pack.node("MiVEInitFromWan").validate_inputs(filename=name, layers="first+last", vlm="2b")
    (pack.base / "models" / "diffusion_models" / name).unlink()


def test_an_interrupted_conversion_leaves_no_file(pack, wan):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        pack.run("MiVEInitFromWan", model="wan_t2v.safetensors", filename="broken.safetensors", vlm="2b", layers="first+last")
    assert not [path.name for path in (pack.base / "models" / "diffusion_models").iterdir() if "broken" in path.name]


@pytest.mark.parametrize(
    "name",
    [
        "../out.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        ".safetensors",
        "out.ckpt",
        "/tmp/out.safetensors",
        "C:\\x.safetensors",
        "a\0.safetensors",
        "a\ud800.safetensors",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused_when_the_prompt_is_checked(pack, name):
    assert "no plain name" in pack.node("MiVEInitFromWan").validate_inputs(filename=name, layers="first+last", vlm="2b")


def test_what_is_no_wan_is_refused(pack):
    assert "this looks like a MiVE DiT" in refused(pack, "MiVEInitFromWan", model=DIT, filename="new.safetensors", vlm="2b", layers="first+last")
    assert "no layer 99" in pack.node("MiVEInitFromWan").validate_inputs(filename="new.safetensors", layers="99", vlm="2b")


# Layer Diagnostics


def test_layer_diagnostics_are_the_librarys(pack, loaded):
    """The same numbers and pictures as `mive inspect layers`, for the VLM that ComfyUI hosts."""
    from mive_core.evaluation.layer_affinity import measure_layers
    from mive_core.evaluation.layer_pictures import draw_heat_map

    image, mask = still(1), torch.zeros(1, 48, 64)
    mask[:, 16:32, 16:48] = 1
    plot, heat_maps, first, last, numbers, report = pack.run("MiVELayerDiagnostics", vlm=loaded.vlm, image=image, instruction="the red circle", mask=mask)
    expected = measure_layers(loaded.vlm.vlm, image[0], "the red circle", (1, 2, 3, 4), mask[0] > 0.5)
    ratios = [row.ratio for row in expected.layers]
    assert (first, last) == pytest.approx((ratios[0], ratios[-1]), abs=1e-5)
    assert [row["ratio"] for row in json.loads(numbers)["layers"]] == pytest.approx(ratios, abs=1e-5)
    assert plot.shape == (1, 460, 960, 3) and len(heat_maps) == 4
    torch.testing.assert_close(heat_maps, torch.stack([draw_heat_map(image[0], row) for row in expected.layers]), atol=0.02, rtol=0)
    assert "0.228 at the last" in report


def test_layer_diagnostics_without_a_mask_and_with_chosen_layers(pack, loaded):
    choice, _ = pack.run("MiVELayerSelect", preset="custom", custom="0,4", vlm=loaded.vlm)
    _, heat_maps, first, _, numbers, report = pack.run("MiVELayerDiagnostics", vlm=loaded.vlm, image=still(1), instruction="night", layers=choice)
    assert len(heat_maps) == 2 and first != first and [row["layer"] for row in json.loads(numbers)["layers"]] == [0, 4] and "no mask" in report


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"instruction": " "}, "the instruction is empty"),
        ({"image": still(3)}, "one image is needed; got 3 of them"),
        ({"mask": torch.ones(2, 48, 64)}, "one mask is needed"),
        ({"mask": torch.zeros(1, 48, 64)}, "the mask is empty"),
        ({"mask": torch.ones(1, 48, 64)}, "covers the whole image"),
        ({"mask": torch.ones(1, 64, 64)}, "got 64x64; expected 64x48"),
    ],
)
def test_layer_diagnostics_of_bad_input(pack, loaded, changed, said):
    assert said in refused(pack, "MiVELayerDiagnostics", **{"vlm": loaded.vlm, "image": still(1), "instruction": "night", **changed})


def test_layer_diagnostics_of_layers_that_the_vlm_lacks(pack, loaded):
    choice, _ = pack.run("MiVELayerSelect", preset="custom", custom="1,99")
    assert "no layer 99" in refused(pack, "MiVELayerDiagnostics", vlm=loaded.vlm, image=still(1), instruction="night", layers=choice)
