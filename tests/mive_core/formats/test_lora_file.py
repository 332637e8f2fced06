"""A LoRA file: what is written is what a loader adds to the weights, and the spellings of other trainers are read as ours."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.formats.lora_file import LoRAFile, layer_name, lora_key_map, lora_metadata, read_lora, write_lora

CONFIG = PRESETS["tiny"]
LAYERS = ("self_attn.q", "self_attn.o", "ffn.0", "ffn.2")
DIFFUSERS = {"self_attn.q": "attn1.to_q", "self_attn.o": "attn1.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}
RANK, ALPHA = 4, 6.0


def adapters() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {f"blocks.{n}.{layer}": (torch.randn(RANK, 10, generator=generator), torch.randn(7, RANK, generator=generator)) for n in (0, 11) for layer in LAYERS}


def differences() -> dict[str, torch.Tensor]:
    shapes = {
        "context.fuse.weight": (6, 6),
        "context.fuse.bias": (6,),
        "context.norms.0.weight": (5,),
        "patch_embedding.weight": (6, 4, 1, 2, 2),
        "blocks.0.modulation": (1, 6, 6),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def assert_same(got: dict[str, tuple], expected: dict[str, tuple]) -> None:
    assert got.keys() == expected.keys()
    for layer, (down, up) in expected.items():
        torch.testing.assert_close(got[layer][1] @ got[layer][0], up @ down)


def test_what_is_written_is_read_again(tmp_path):
    path, changed = tmp_path / "lora.safetensors", differences()
    write_lora(path, adapters(), 1.5, changed, lora_metadata(RANK, "base.safetensors", CONFIG, ("context", "patch_embedding")))
    found = read_lora(path)
    assert_same(found.adapters, {layer: (down, 1.5 * up) for layer, (down, up) in adapters().items()})
    assert found.differences.keys() == changed.keys() and all(torch.equal(found.differences[name], changed[name]) for name in changed)
    assert found.base_config == CONFIG and found.metadata["mive.base"] == "base.safetensors" and found.metadata["mive.lora"] == f"rank {RANK}"
    assert found.metadata["mive.new_parts"] == "context,patch_embedding" and found.unread == ()


def test_the_keys_are_those_of_comfyuis_loader(tmp_path):
    write_lora(tmp_path / "lora.safetensors", {"blocks.0.ffn.0": (torch.ones(1, 2), torch.ones(2, 1))}, 1.0, differences(), {})
    assert load_file(tmp_path / "lora.safetensors").keys() == {
        "diffusion_model.blocks.0.ffn.0.lora_A.weight",
        "diffusion_model.blocks.0.ffn.0.lora_B.weight",
        "diffusion_model.context.fuse.diff",
        "diffusion_model.context.fuse.diff_b",
        "diffusion_model.context.norms.0.diff",
        "diffusion_model.patch_embedding.diff",
        "diffusion_model.blocks.0.modulation.diff",
    }


def test_a_lora_without_new_parts_does_not_name_any(tmp_path):
    assert "mive.new_parts" not in lora_metadata(RANK, "base", CONFIG)
    assert LoRAFile({}, {}, {}, ()).base_config is None


@pytest.mark.parametrize(
    "spelling, down, up, alpha",
    [
        ("diffusion_model.blocks.{n}.{layer}", "lora_A.weight", "lora_B.weight", None),
        ("base_model.model.transformer.blocks.{n}.{diffusers}", "lora_A.weight", "lora_B.weight", ALPHA),
        ("transformer.blocks.{n}.{diffusers}", "lora.down.weight", "lora.up.weight", None),
        ("blocks.{n}.{layer}", "lora_A.default.weight", "lora_B.default.weight", None),
        ("lora_unet_blocks_{n}_{flat}", "lora_down.weight", "lora_up.weight", ALPHA),
        ("lora_unet__blocks_{n}_{flat}", "lora_down.weight", "lora_up.weight", ALPHA),
        ("lora_transformer_blocks_{n}_{flat_diffusers}", "lora_down.weight", "lora_up.weight", ALPHA),
    ],
)
def test_other_spellings_are_read_as_the_same_layers(tmp_path, spelling, down, up, alpha):
    tensors = {"diffusion_model.blocks.0.norm3.set_weight": torch.ones(3)}
    for name, (a, b) in adapters().items():
        n, layer = name.split(".", 2)[1:]
        diffusers = DIFFUSERS[layer]
        key = spelling.format(n=n, layer=layer, diffusers=diffusers, flat=layer.replace(".", "_"), flat_diffusers=diffusers.replace(".", "_"))
        tensors |= {f"{key}.{down}": a.half(), f"{key}.{up}": b.half()} | ({f"{key}.alpha": torch.tensor(alpha)} if alpha else {})
    save_file(tensors, tmp_path / "other.safetensors")
    found = read_lora(tmp_path / "other.safetensors")
    factor = (alpha or RANK) / RANK
    assert_same(found.adapters, {layer: (a.half().float(), factor * b.half().float()) for layer, (a, b) in adapters().items()})
    assert found.base_config is None and found.unread == ("diffusion_model.blocks.0.norm3.set_weight",)


def test_layers_that_mive_lacks_keep_wans_names(tmp_path):
    save_file({"diffusion_model.blocks.3.cross_attn.k.lora_A.weight": torch.ones(1, 2), "diffusion_model.blocks.3.cross_attn.k.lora_B.weight": torch.ones(2, 1),
               "diffusion_model.blocks.3.cross_attn.k.diff_b": torch.ones(2)}, tmp_path / "cross.safetensors")  # fmt: skip
    found = read_lora(tmp_path / "cross.safetensors")
    assert found.adapters.keys() == {"blocks.3.cross_attn.k"} and found.differences.keys() == {"blocks.3.cross_attn.k.bias"}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"patch_embedding.weight": torch.ones(2)}, "looks like an unknown model.*expected a LoRA"),
        ({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.ones(1, 2)}, "not whole; got one matrix of blocks.0.ffn.0"),
        ({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1), "a.dora_scale": torch.ones(2)}, "DoRA"),
    ],
)
def test_other_files_are_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        read_lora(tmp_path / "other.safetensors")


def test_every_name_of_a_layer_that_loaders_know_is_read_as_that_layer():
    from mive_core.formats.checkpoint import state_dict_shapes

    weights = [key for key in state_dict_shapes(CONFIG) if key.endswith(".weight")]
    named = lora_key_map(f"diffusion_model.{key}" for key in weights)
    assert len(named) > 10 * len(weights)
    assert {name: layer_name(name) for name in named} == {name: key.removeprefix("diffusion_model.").removesuffix(".weight") for name, key in named.items()}
