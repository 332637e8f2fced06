"""Stock patching nodes on the MODEL: those that fit have the effect that they have on Wan, the others are refused by name."""

import importlib

import pytest
import torch
from safetensors.torch import load_file
from test_sampling import DIT, sample


def patched(model, module: str, node: str, **inputs):
    """The MODEL as one of ComfyUI's nodes returns it, its other inputs at their defaults."""
    kind = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    if hasattr(kind, "define_schema"):
        defaults = {i.id: i.default for i in kind.define_schema().inputs if getattr(i, "default", None) is not None}
        output = kind.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**{"model": model, **defaults, **inputs})
        return getattr(output, "args", output)[0]
    required = kind.INPUT_TYPES()["required"]
    defaults = {name: spec[1]["default"] if len(spec) > 1 else spec[0][0] for name, spec in required.items() if name != "model"}
    return getattr(kind(), kind.FUNCTION)(**{"model": model, **defaults, **inputs})[0]


REFUSED = [
    ("nodes_nag", "NAGuidance", {"nag_scale": 5.0, "nag_alpha": 0.5}, r"NAGuidance \(nodes_nag\) does not fit MiVE"),
    ("nodes_pag", "PerturbedAttentionGuidance", {}, r"PerturbedAttentionGuidance \(nodes_pag\) does not fit MiVE"),
    ("nodes_sag", "SelfAttentionGuidance", {}, r"SelfAttentionGuidance \(nodes_sag\) does not fit MiVE"),
    ("nodes_tomesd", "TomePatchModel", {}, r"TomePatchModel \(nodes_tomesd\) does not fit MiVE"),
    ("nodes_hypertile", "HyperTile", {}, r"HyperTile \(nodes_hypertile\) does not fit MiVE"),
    ("nodes_model_downscale", "PatchModelAddDownscale", {"downscale_method": "bicubic", "upscale_method": "bicubic"}, "does not fit MiVE"),
    ("nodes_slg", "SkipLayerGuidanceDiT", {"double_layers": "40", "start_percent": 0.0}, r"SkipLayerGuidanceDiT \(nodes_slg\) .* dit double_block 40"),
    ("nodes_context_windows", "ContextWindowsManualNode", {"context_schedule": "standard_static", "fuse_method": "pyramid"}, "got dim 0; expected dim 2"),
    ("nodes_model_advanced", "ModelSamplingDiscrete", {}, "got ModelSamplingDiscrete, EPS; expected flow matching"),
]


@pytest.mark.parametrize(("module", "node", "inputs", "message"), REFUSED, ids=[row[1] for row in REFUSED])
def test_a_patch_without_effect_is_refused_by_name(pack, loaded, module, node, inputs, message):
    model = patched(loaded.model, module, node, **inputs)
    with pytest.raises(ValueError, match=message):
        sample(pack, loaded, model=model, cfg=2.0)


@pytest.mark.parametrize(("module", "node"), [("nodes_freelunch", "FreeU"), ("nodes_freelunch", "FreeU_V2")])
def test_a_patch_for_unets_is_refused_in_its_node(loaded, module, node):
    with pytest.raises(ValueError, match="made for a U-Net"):
        patched(loaded.model, module, node)


def test_a_part_of_wans_that_is_missing_is_named(loaded):
    """KJNodes' WanVideoNAG asks for the text embedding, TeaCache packs for forward_orig."""
    dit = loaded.model.model.diffusion_model
    assert not hasattr(dit, "text_embedding")
    with pytest.raises(ValueError, match="MiVE's DiT has no text_embedding"):
        _ = dit.text_embedding
    assert dit.dim // dit.num_heads == dit.config.head_dim


def test_another_attention_is_refused(pack, loaded):
    """KJNodes' Enhance-A-Video puts an attention for Wan's sequence in the place of ours."""

    class Enhance:
        def forward(self, x, freqs, transformer_options={}):
            return x

    model = loaded.model.clone()
    model.add_object_patch("diffusion_model.blocks.0.self_attn.forward", Enhance().forward)
    with pytest.raises(ValueError, match=r"does not fit MiVE; got a patch of diffusion_model\.blocks\.0\.self_attn\.forward"):
        sample(pack, loaded, model=model, steps=1)
    assert sample(pack, loaded, steps=1).isfinite().all()  # the next run has the DiT's own attention


@torch.inference_mode()
def test_rope_is_scaled(pack, loaded):
    plain = sample(pack, loaded)
    same = sample(pack, loaded, model=patched(loaded.model, "nodes_rope", "ScaleROPE"))
    assert (same - plain).abs().max() < 1e-4
    for axis in "txy":
        assert (sample(pack, loaded, model=patched(loaded.model, "nodes_rope", "ScaleROPE", **{f"scale_{axis}": 1.5})) - plain).abs().max() > 1e-3


@torch.inference_mode()
def test_scaled_positions_are_wans(loaded):
    """Of one frame with its reference a frame before, with condition tokens unrotated."""
    from comfy.ldm.wan.model import WanModel

    dit = loaded.model.model.diffusion_model
    options = {"rope_options": {"scale_x": 0.5, "shift_x": 2.0, "scale_y": 1.5, "shift_y": 0.0, "scale_t": 1.0, "shift_t": 3.0}}
    got = dit.rotary(4, (3, 4, 5), torch.zeros(1, 1), "cpu", transformer_options=options)
    assert torch.equal(got[:, :4], torch.ones_like(got[:, :4]))
    wan = WanModel.rope_encode(dit, 3, 4 * dit.patch_size[1], 5 * dit.patch_size[2], device="cpu", dtype=torch.float32, transformer_options=options)
    expected = torch.complex(wan[..., 0, 0], wan[..., 1, 0])
    assert got.shape == (1, 4 + 4 * 20, 1, dit.config.head_dim // 2)
    assert torch.allclose(got[:, 4 + 20 :], expected, atol=1e-5)


@torch.inference_mode()
def test_an_embedder_of_another_rope_is_used(pack, loaded):
    """RIFLEx of KJNodes replaces rope_embedder, with one frequency of the time axis lowered."""
    from comfy.ldm.flux.layers import EmbedND

    class Slower(EmbedND):
        def forward(self, ids):
            return super().forward(ids * ids.new_tensor([0.5, 1.0, 1.0]))

    own = loaded.model.model.diffusion_model.rope_embedder
    model = loaded.model.clone()
    model.add_object_patch("diffusion_model.rope_embedder", Slower(own.dim, own.theta, own.axes_dim))
    got = sample(pack, loaded, model=model)
    assert (got - sample(pack, loaded, model=patched(loaded.model, "nodes_rope", "ScaleROPE", scale_t=0.5))).abs().max() < 1e-4
    assert (got - sample(pack, loaded)).abs().max() > 1e-3


def test_a_wrapper_that_writes_into_its_input_changes_nothing(pack, loaded):
    """EasyCache adds its difference to the input, which in float32 was also the sampler's: a skipped step lost the edit."""
    import comfy.patcher_extension

    def spoil(executor, x, *args, **kwargs):
        velocity = executor(x, *args, **kwargs)
        x += 1
        return velocity

    model = loaded.model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "spoil", spoil)
    assert torch.equal(sample(pack, loaded, model=model), sample(pack, loaded))


@torch.inference_mode()
def test_renormalised_guidance(pack, loaded):
    guided = sample(pack, loaded, cfg=20.0)
    got = sample(pack, loaded, cfg=20.0, model=patched(loaded.model, "nodes_lumina2", "RenormCFG"))
    assert got.isfinite().all() and (got - guided).abs().max() > 1e-3


# Areas


def areas(loaded, *boxes):
    """One positive of several areas, (width, height, left, top) in pixels."""
    import nodes

    return [part for box in boxes for part in nodes.ConditioningSetArea().append(loaded.positive, *box, 1.0)[0]]


@torch.inference_mode()
def test_an_area_cuts_source_and_reference(pack, loaded):
    """ConditioningSetArea cut the latent alone, so the DiT's channels did not fit together."""
    seen = []
    dit = loaded.model.model.diffusion_model
    hook = dit.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        got = sample(pack, loaded, positive=areas(loaded, (32, 48, 0, 0), (40, 48, 24, 0)), steps=1)
    finally:
        hook.remove()
    assert got.isfinite().all() and got.shape == loaded.latent["samples"].shape
    for name in ("source", "reference"):
        whole = loaded.model.model.process_latent_in(loaded.positive[0][1][f"mive_{name}_latents"])
        parts = {kwargs[name].shape[-1]: kwargs[name] for kwargs in seen}
        assert torch.equal(parts[4], whole[..., :4]) and torch.equal(parts[5], whole[..., 3:8])


@torch.inference_mode()
def test_an_area_over_everything_changes_nothing(pack, loaded):
    assert torch.allclose(sample(pack, loaded, positive=areas(loaded, (64, 48, 0, 0))), sample(pack, loaded), atol=1e-5)


@torch.inference_mode()
def test_in_an_area_of_time_references_count_from_its_first_frame(pack, loaded):
    from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo

    (positive,) = ConditioningSetAreaPercentageVideo().append(loaded.positive, 1.0, 1.0, 0.4, 0.0, 0.0, 0.4, 1.0)
    seen = []
    dit = loaded.model.model.diffusion_model
    hook = dit.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0].shape[2], kwargs)), with_kwargs=True)
    try:
        sample(pack, loaded, positive=positive, steps=1)
    finally:
        hook.remove()
    ((frames, kwargs),) = seen
    assert frames == 2 and kwargs["reference_times"].tolist() == [[-2.0]]
    whole = loaded.model.model.process_latent_in(loaded.positive[0][1]["mive_source_latents"])
    assert torch.equal(kwargs["source"], whole[:, :, 2:4])


# The stock loaders


def test_the_stock_loaders_refuse_a_mive_file(pack, base, loaded):
    """By its keys it is Wan's: the stock loader once gave a MODEL that made noise."""
    import comfy.sd
    from comfy.supported_models import models

    import nodes

    with pytest.raises(ValueError, match="this is a MiVE DiT.*load it with MiVE Load DiT"):
        nodes.UNETLoader().load_unet(DIT, "default")
    saved = {f"model.diffusion_model.{key}": value for key, value in load_file(base / "models" / "diffusion_models" / DIT).items()}  # as Save Model does
    with pytest.raises(ValueError, match="load it with MiVE Load DiT"):
        comfy.sd.load_diffusion_model_state_dict(saved)
    wan = {"head.modulation": 0, "blocks.0.cross_attn.q.weight": 0}
    assert [kind.__name__ for kind in models].count("StockLoaderGuard") == 1 and not models[0].matches({"image_model": "wan2.1"}, wan)
