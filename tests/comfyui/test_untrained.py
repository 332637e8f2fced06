"""A MODEL that was never trained says so wherever its edits would be noise, until a LoRA has what it lacks."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.formats.checkpoint import read_config, save_dit
from mive_core.formats.quantize import quantize
from mive_core.formats.untrained import untrained_metadata, untrained_parts

NAME, NOISE = "start.safetensors", "its context and patch_embedding have not been trained yet, and until they are, its edits are noise"


@pytest.fixture(scope="module")
def start(base):
    """A start for training among the DiTs."""
    folder = base / "models" / "diffusion_models"
    save_dit(folder / NAME, load_file(folder / "random.safetensors"), read_config(folder / "random.safetensors"), metadata=untrained_metadata())
    yield folder / NAME
    (folder / NAME).unlink()


@pytest.fixture
def new_parts(base, loaded):
    """A LoRA that holds differences of the new parts."""
    path = base / "models" / "loras" / "new_parts.safetensors"
    state = loaded.model.model.diffusion_model.state_dict()
    difference = {f"diffusion_model.{name}.diff": 0.1 * torch.randn(state[f"{name}.weight"].shape) for name in ("context.fuse", "patch_embedding")}
    save_file(difference, path)
    yield path.name
    path.unlink()


def text_of(output) -> str:
    return "\n".join(output.ui["text"])


def test_every_node_that_edits_says_so(pack, loaded, start, request_, caplog):
    sampling = dict(seed=0, steps=1, cfg=1.0)
    with caplog.at_level(logging.WARNING):
        output = pack.output("MiVELoadDiT", model=NAME)
    assert NOISE in text_of(output) and f"MiVE: {NAME}: " in caplog.text and NOISE in caplog.text
    (model,) = output.args
    caplog.clear()
    sampled = pack.output("MiVESampler", model=model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, **sampling)
    assert NOISE in text_of(sampled) and NOISE in caplog.text
    source, reference = request_.source.frames, request_.reference[None]
    edited = pack.output(
        "MiVEEditVideo", model=model, vlm=loaded.vlm, vae=loaded.vae, source=source, reference=reference, instruction="make it blue", fps=8.0, **sampling
    )
    assert NOISE in text_of(edited)
    assert NOISE in pack.run("MiVEPreflight", video=source, model=model)[-1]


def test_a_trained_one_says_nothing(pack, loaded, caplog):
    output = pack.output("MiVELoadDiT", model="random.safetensors")
    assert text_of(output) == "" and NOISE not in pack.run("MiVEPreflight", video=torch.rand(5, 48, 64, 3), model=output.args[0])[-1]
    pack.run("MiVESampler", model=output.args[0], positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=0, steps=1, cfg=1.0)
    assert "noise" not in caplog.text


def test_a_lora_with_the_new_parts_makes_it_an_editor_by_either_loader(pack, start, new_parts):
    import nodes

    warning = pack.submodule("nodes.bridge.untrained").untrained_warning
    (model,) = pack.run("MiVELoadDiT", model=NAME)
    load = nodes.LoraLoaderModelOnly().load_lora_model_only
    assert NOISE in warning(model) and NOISE in warning(load(model, "random.safetensors", 1.0)[0])  # of the blocks alone
    assert warning(load(model, new_parts, 1.0)[0]) == "" and warning(pack.run("MiVELoadLoRA", model=model, lora_name=new_parts)[0]) == ""
    assert NOISE in warning(pack.run("MiVELoadLoRA", model=model, lora_name=new_parts, strength_model=0.0)[0])


def test_what_save_model_writes_is_marked_until_a_lora_is_in_it(pack, start, new_parts, base):
    from comfy_extras.nodes_model_merging import ModelSave

    import nodes

    (model,) = pack.run("MiVELoadDiT", model=NAME)
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, new_parts, 1.0)[0]
    for name, saved, expected in (("start", model, ("context", "patch_embedding")), ("editor", patched, ())):
        with torch.inference_mode():
            ModelSave().save(saved, f"marks/{name}", prompt={}, extra_pnginfo={})
        path = base / "output" / "marks" / f"{name}_00001_.safetensors"
        assert untrained_parts(path) == expected
        assert pack.submodule("nodes.bridge.load").load_dit(path).model.untrained == expected


def test_in_8_bits_it_still_says_so(pack, start):
    quantize(start, start.with_name("start_fp8.safetensors"))
    assert NOISE in text_of(pack.output("MiVELoadDiT", model="start_fp8.safetensors"))
    start.with_name("start_fp8.safetensors").unlink()
