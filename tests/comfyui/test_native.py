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

    compiled, = TorchCompileModel.execute(loaded.model, "inductor").args
    try:
        result = sample(pack, loaded, model=compiled)
    except InductorError as error:
        pytest.skip(f"NO COMPILER for inductor: {error}")
    assert (result - sample(pack, loaded)).abs().max() < 1e-4


@torch.inference_mode()
def test_weights_left_behind_are_brought_over_when_used(pack, loaded, base):
    """On a card with room for a tenth of the weights, most stay in main memory and every layer casts its own."""
    model = pack.submodule("nodes.bridge.load").load_dit(base / "models" / "diffusion_models" / "random.safetensors", disable_dynamic=True)
    plain = model.model.diffusion_model
    arguments = dict(x=torch.randn(1, 16, 5, 6, 8), t=torch.tensor([0.5]), source=torch.randn(1, 16, 5, 6, 8),
                     reference=torch.randn(1, 16, 1, 6, 8), condition=torch.randn(1, 9, model.model.config.width))
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
