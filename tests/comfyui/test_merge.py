"""A LoRA that holds new parts: what ComfyUI's loaders make of it is the file that `mive merge` writes, and another base is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.formats.checkpoint import read_config, save_dit
from mive_core.formats.lora_file import lora_metadata, write_lora
from mive_core.formats.merge import merge
from mive_core.formats.quantize import MATRIX
from mive_core.formats.untrained import NEW_PARTS, untrained_metadata

START, LORA, STRENGTH = "fresh.safetensors", "with_new_parts.safetensors", 0.7


@pytest.fixture(scope="module")
def start(pack, base):
    """A start for training, fp32."""
    folder = base / "models" / "diffusion_models"
    save_dit(folder / START, load_file(folder / "random.safetensors"), read_config(folder / "random.safetensors"), metadata=untrained_metadata())
    yield folder / START
    (folder / START).unlink()


@pytest.fixture
def write(start, base):
    """Writes a LoRA of every matrix of the blocks and of all new parts; changes of the config of its base."""
    path = base / "models" / "loras" / LORA

    def save(**changes) -> int:
        state, config = load_file(start), replace(read_config(start), **changes)
        torch.manual_seed(4)
        matrices = [name for name in state if MATRIX.fullmatch(name)]
        adapters = {name.removesuffix(".weight"): (torch.randn(4, state[name].shape[1]), 0.05 * torch.randn(len(state[name]), 4)) for name in matrices}
        differences = {name: 0.1 * torch.randn_like(value) for name, value in state.items() if name.startswith(NEW_PARTS)}
        write_lora(path, adapters, 0.5, differences, lora_metadata(4, "trained_on.safetensors", config, NEW_PARTS))
        return 2 * len(adapters) + len(differences)

    yield save
    path.unlink()


def weights_of(model) -> dict[str, torch.Tensor]:
    """With the patches in them."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return {name: value.float().clone() for name, value in model.model.diffusion_model.state_dict().items()}


def test_either_loader_makes_the_merged_file(pack, start, write, base):
    import nodes

    number = write()
    report = merge(start, [(base / "models" / "loras" / LORA, STRENGTH)], base / "models" / "diffusion_models" / "merged.safetensors")
    merged = load_file(base / "models" / "diffusion_models" / "merged.safetensors")
    (model,) = pack.run("MiVELoadDiT", model=START)
    plain = weights_of(model)
    stock = nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, STRENGTH)[0]
    ours, said = pack.run("MiVELoadLoRA", model=model, lora_name=LORA, strength_model=STRENGTH)
    (loaded,) = pack.run("MiVELoadDiT", model="merged.safetensors")
    for patched in (stock, ours, loaded):
        got = weights_of(patched)
        assert got.keys() == merged.keys()
        assert max(float((got[name] - merged[name]).abs().max()) for name in merged) < 1e-5
    changed = [name for name in merged if (merged[name] - plain[name]).abs().max() > 1e-3]
    assert len(changed) == report["changed"] and {name for name in plain if name.startswith(NEW_PARTS)} < set(changed)
    new = len([name for name in changed if name.startswith(NEW_PARTS)])
    assert said == f"{LORA}: all {number} keys fit, {new} of them new parts" and report["loras"][0]["fit"] == said.removeprefix(f"{LORA}: ")
    (base / "models" / "diffusion_models" / "merged.safetensors").unlink()


def test_new_parts_of_another_base_are_refused_with_both_named(pack, start, write):
    (model,) = pack.run("MiVELoadDiT", model=START)
    write(vlm="Qwen3-VL-8B", vlm_width=4096)
    with pytest.raises(
        ValueError, match=f"{LORA}: .*new parts of another base; got made on trained_on.safetensors: Qwen3-VL-8B, .*expected {START}: Qwen3-VL-"
    ):
        pack.run("MiVELoadLoRA", model=model, lora_name=LORA)


def test_a_lora_of_the_blocks_alone_leaves_a_start_a_start(pack, start):
    (model,) = pack.run("MiVELoadDiT", model=START)
    _, said = pack.run("MiVELoadLoRA", model=model, lora_name="random.safetensors")
    first, second = said.split("\n")
    assert first == "random.safetensors: all 4 keys fit" and "its edits are noise" in second


def test_misshapen_new_parts_are_left_out_by_the_stock_loader_too(pack, start, base, caplog):
    import nodes

    (model,) = pack.run("MiVELoadDiT", model=START)
    state = model.model.diffusion_model.state_dict()
    width = state["context.fuse.weight"].shape[0]
    path = base / "models" / "loras" / LORA
    save_file({"diffusion_model.context.fuse.diff": torch.ones(width, width), "diffusion_model.context.projections.0.diff": torch.ones(3, 5)}, path)
    (patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 1.0)
    assert "1 have another shape" in caplog.text and set(patched.patches) == {"diffusion_model.context.fuse.weight"}
    path.unlink()
