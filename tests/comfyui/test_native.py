"""What ComfyUI does to any MODEL, done to ours: compiled, left behind in part, previewed, run again and again."""

import pytest
import torch

STEPS = 2


def sample(pack, loaded, **changed) -> torch.Tensor:
    given = dict(model=loaded.model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=3, steps=STEPS, cfg=1.0)
    return pack.run("MiVESampler", **{**given, **changed})[0]["samples"]


def test_compiled_equals_plain(pack, loaded):
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._inductor.exc import InductorError

    (compiled,) = TorchCompileModel.execute(loaded.model, "inductor").args
    try:
        result = sample(pack, loaded, model=compiled)
    except InductorError as error:
        pytest.skip(f"NO COMPILER for inductor: {error}")
    assert (result - sample(pack, loaded)).abs().max() < 1e-4


def test_blocks_are_skipped_and_replaced_by_patches(pack, loaded):
    """Skip-layer guidance leaves blocks out of its extra forward; a patch that runs the original block changes nothing."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    plain = sample(pack, loaded)
    (skipping,) = SkipLayerGuidanceDiT.execute(loaded.model, 2.0, 0.0, 1.0, "1, 2", "").args
    assert (sample(pack, loaded, model=skipping) - plain).abs().max() > 1e-3
    seen = []

    def same(args, extra):
        seen.append((args["transformer_options"]["block_index"], args["transformer_options"]["total_blocks"], tuple(args["img"].shape)))
        return extra["original_block"](args)

    replaced = loaded.model.clone()
    replaced.set_model_patch_replace(same, "dit", "double_block", 1)
    assert torch.equal(sample(pack, loaded, model=replaced), plain)
    width, blocks = loaded.model.model.config.width, loaded.model.model.config.num_blocks
    assert len(seen) == STEPS and {(index, total, shape[2]) for index, total, shape in seen} == {(1, blocks, width)}


@torch.inference_mode()
def test_weights_left_behind_are_brought_over_when_used(pack, loaded, base):
    """On a card with room for a tenth of the weights, most stay in main memory and every layer casts its own."""
    model = pack.submodule("nodes.bridge.load").load_dit(base / "models" / "diffusion_models" / "random.safetensors", disable_dynamic=True)
    plain = model.model.diffusion_model
    arguments = dict(
        x=torch.randn(1, 16, 5, 6, 8),
        t=torch.tensor([0.5]),
        source=torch.randn(1, 16, 5, 6, 8),
        reference=torch.randn(1, 16, 1, 6, 8),
        condition=torch.randn(1, 9, model.model.config.width),
    )
    expected = plain(**arguments)
    model.load(torch.device("cpu"), lowvram_model_memory=model.model_size() // 10)
    casting = [module for module in plain.modules() if getattr(module, "comfy_cast_weights", False)]
    assert len(casting) > 20
    assert torch.equal(plain(**arguments), expected)


def test_latents_are_previewed(pack, loaded, monkeypatch):
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    shown = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, total=None, preview=None: shown.append((value, total, preview)))
    sample(pack, loaded)
    assert [(value, total) for value, total, _ in shown] == [(1, STEPS), (2, STEPS)]
    kind, image, _ = shown[-1][2]
    assert kind == "JPEG" and image.size == (8, 6) and len(image.getcolors()) > 4
