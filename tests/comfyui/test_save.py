"""ComfyUI's own Save Model: what it writes of a MiVE MODEL loads again."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mive_core.formats.quantize import quantize

DIT, LORA = "random.safetensors", "random.safetensors"


@pytest.fixture(scope="module")
def save(pack, base):
    """(MODEL, name) -> the entry of its file in MiVE Load DiT's list, as a restarted ComfyUI shows it."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    folder = base / "output" / "diffusion_models"
    folder_paths.add_model_folder_path("diffusion_models", str(folder))  # as ComfyUI's main does

    def run(model, name: str) -> str:
        with torch.inference_mode():
            ModelSave().save(model, f"diffusion_models/{name}", prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})
        return f"{name}_00001_.safetensors"

    return run


def with_lora(model):
    import nodes

    return nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)[0]


def sample(pack, loaded, model) -> torch.Tensor:
    return pack.run("MiVESampler", model=model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=3, steps=2, cfg=1.0)[0][
        "samples"
    ]


def test_a_model_with_a_lora_is_saved_and_loads_again(pack, loaded, save, base):
    patched = with_lora(loaded.model)
    expected = sample(pack, loaded, patched)
    name = save(patched, "baked")
    (again,) = pack.run("MiVELoadDiT", model=name)
    assert again.model.config == loaded.model.model.config
    assert torch.equal(sample(pack, loaded, again), expected)
    assert (expected - sample(pack, loaded, loaded.model)).abs().max() > 1e-3  # the LoRA is in it
    stored = load_file(base / "output" / "diffusion_models" / name)
    assert stored.keys() == loaded.model.model.diffusion_model.state_dict().keys() | {"mive.config"}
    with safe_open(base / "output" / "diffusion_models" / name, framework="pt") as file:
        assert "workflow" in file.metadata()  # ComfyUI's own metadata is there as ever


def test_a_saved_file_is_saved_again(pack, loaded, save):
    (again,) = pack.run("MiVELoadDiT", model=save(loaded.model, "once"))
    (twice,) = pack.run("MiVELoadDiT", model=save(again, "twice"))
    assert torch.equal(sample(pack, loaded, twice), sample(pack, loaded, loaded.model))


def test_scaled_fp8_with_a_lora_is_saved_and_loads_again(pack, loaded, save, base):
    """The matrices stay in 8 bits; those that the LoRA changed are scaled anew."""
    folder = base / "models" / "diffusion_models"
    quantize(folder / DIT, folder / "small.safetensors")
    (model,) = pack.run("MiVELoadDiT", model="small.safetensors")
    expected = sample(pack, loaded, with_lora(model))
    (again,) = pack.run("MiVELoadDiT", model=save(with_lora(model), "small"))
    assert again.model.diffusion_model.blocks[0].ffn[0].quant_format == "float8_e4m3fn" and again.model_size() < 0.5 * loaded.model.model_size()
    off, without = ((sample(pack, loaded, other) - expected).norm() for other in (again, model))
    assert off < 1e-3 < without
    (folder / "small.safetensors").unlink()


def test_a_file_without_its_config_is_refused_with_the_reason(pack, loaded, base):
    """As older packs' MODELs were saved: the heads, the VLM and its layers cannot be read off the shapes."""
    path = base / "models" / "diffusion_models" / "older.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in loaded.model.model.diffusion_model.state_dict().items()}, path)
    with pytest.raises(ValueError, match="saved without MiVE's config.*save it again with this version"):
        pack.run("MiVELoadDiT", model=path.name)
    path.unlink()
