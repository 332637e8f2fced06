"""A VLM whose layers are read when they run: the same states, and never two layers' weights at once."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.prompt import build_image_inputs
from mive_core.vlm import VLM
from mive_core.vlm_stream import load_streamed, streamed_layers


def inputs_of(vlm: VLM):
    image = torch.rand(96, 160, 3, generator=torch.Generator().manual_seed(2))
    return build_image_inputs(image, "make the red circle blue", vlm.processor, PRESETS["tiny"])


@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4), (2,)])
def test_the_states_are_the_same_bit_for_bit(vlm, vlm_folder, layers):
    streamed, inputs = load_streamed(vlm_folder), inputs_of(vlm)
    expected = vlm.encode(inputs, layers).states
    assert expected.abs().mean() > 0.01
    for _ in range(2):
        assert torch.equal(streamed.encode(inputs, layers).states, expected)
    assert (streamed.name, streamed.num_layers, streamed.width) == (vlm.name, vlm.num_layers, vlm.width)


def test_one_layers_weights_at_a_time(vlm, vlm_folder):
    streamed, held = load_streamed(vlm_folder), []
    layers = [layer for group in streamed_layers(streamed.model).values() for layer in group]

    def count(*_) -> None:
        held.append(sum(not parameter.is_meta for layer in layers for parameter in list(layer.parameters())[:1]))

    for layer in layers:
        next(layer.children()).register_forward_hook(count)
    streamed.encode(inputs_of(vlm), (1, 4))
    assert held == [1] * len(layers) and len(layers) == 7
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def test_other_dtypes_are_read_as_asked(vlm, vlm_folder):
    streamed, whole = load_streamed(vlm_folder, dtype=torch.bfloat16), VLM.load(vlm_folder, dtype=torch.bfloat16)
    assert torch.equal(streamed.encode(inputs_of(vlm), (4,)).states, whole.encode(inputs_of(vlm), (4,)).states)


def test_a_missing_weight_and_one_of_another_shape_are_named_before_anything_runs(vlm_folder, tmp_path):
    folder = shutil.copytree(vlm_folder, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    key = "model.language_model.layers.2.mlp.up_proj.weight"
    save_file({name: value for name, value in weights.items() if name != key}, folder / "model.safetensors")
    with pytest.raises(UserError, match="no language_model.layers.2.mlp.up_proj.weight"):
        load_streamed(folder)
    save_file({**weights, key: weights[key][:5].clone()}, folder / "model.safetensors")
    with pytest.raises(UserError, match="another shape than config.json says"):
        load_streamed(folder)


def test_another_model_is_refused(vlm_folder, tmp_path):
    folder = shutil.copytree(vlm_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(UserError, match="another model; got llama"):
        load_streamed(folder)
