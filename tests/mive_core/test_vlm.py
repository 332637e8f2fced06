import json
import shutil
import weakref

import pytest
import torch

from mive_core.config import PRESETS
from mive_core.errors import UserError
from mive_core.prompt import build_inputs
from mive_core.types import Clip, EditRequest
from mive_core.vlm import VLM, collect_hidden_states, model_arguments

CONFIG = PRESETS["tiny"]


def inputs_of(vlm, width=96, height=96, seed=0):
    frames = torch.rand(17, height, width, 3, generator=torch.Generator().manual_seed(seed))
    return build_inputs(EditRequest(Clip(frames, 8.0), frames[0], "make the red circle blue"), vlm.processor, CONFIG)


def hidden_states(vlm, inputs):
    """transformers' own. 4.57 adds DeepStack features into the entry it has already handed out; later ones copy first."""
    text = vlm.model.language_model
    plain = text._deepstack_process
    text._deepstack_process = lambda states, *rest: plain(states.clone(), *rest)
    try:
        return vlm.model(**model_arguments(vlm.model.forward, inputs), output_hidden_states=True).hidden_states
    finally:
        del text._deepstack_process


@pytest.mark.parametrize("width, height", [(96, 96), (160, 96), (192, 112)])
def test_every_layer_equals_transformers_own_hidden_states(vlm, width, height):
    inputs = inputs_of(vlm, width, height)
    theirs = hidden_states(vlm, inputs)
    assert len(theirs) == vlm.num_layers + 1
    ours = vlm.encode(inputs, (0, 1, 2, 3, 4))
    assert ours.layers == (0, 1, 2, 3, 4) and ours.states.shape == (1, 5, inputs.input_ids.shape[1], vlm.width)
    for k, state in enumerate(theirs):
        assert state.abs().mean() > 0.01
        torch.testing.assert_close(ours.states[:, k], state, atol=1e-5, rtol=1e-5)


def test_layers_come_in_the_order_asked_for(vlm):
    inputs = inputs_of(vlm)
    both = vlm.encode(inputs, (4, 1)).states
    assert torch.equal(both[:, 0], vlm.encode(inputs, (4,)).states[:, 0])
    assert torch.equal(both[:, 1], vlm.encode(inputs, (1,)).states[:, 0])


def test_a_deepstack_layer_is_read_before_the_addition(vlm):
    inputs = inputs_of(vlm)
    visual = inputs.mm_token_type_ids[0] > 0
    seen = []
    hook = vlm.model.language_model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    first = vlm.encode(inputs, (1, 2)).states[0, 0]
    hook.remove()
    assert torch.equal(first[~visual], seen[0][0][~visual])
    assert (first[visual] - seen[0][0][visual]).abs().mean() > 0.01


@pytest.mark.parametrize("layers, calls", [((0,), 0), ((1,), 1), ((3, 1), 3), ((4,), 4), ((1, 4), 4)])
def test_no_layer_after_the_deepest_runs(vlm, layers, calls):
    count = []
    hooks = [layer.mlp.register_forward_hook(lambda *_: count.append(1)) for layer in vlm.model.language_model.layers]
    vlm.encode(inputs_of(vlm), layers)
    for hook in hooks:
        hook.remove()
    assert len(count) == calls


def test_the_other_layers_states_are_freed_during_the_pass(vlm):
    outputs, alive = [], []
    text = vlm.model.language_model
    hooks = [layer.register_forward_hook(lambda _, args, out: outputs.append(weakref.ref(out))) for layer in text.layers]
    hooks.append(text.norm.register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in outputs))))
    vlm.encode(inputs_of(vlm), (1, 4))
    for hook in hooks:
        hook.remove()
    assert alive[0] <= 1


def test_a_pass_leaves_nothing_behind_on_the_model(vlm):
    inputs = inputs_of(vlm)
    first = vlm.encode(inputs, (1, 4)).states
    vlm.encode(inputs_of(vlm, 192, 112), (1,))
    assert torch.equal(vlm.encode(inputs, (1, 4)).states, first)


def test_a_failed_pass_removes_its_hooks(vlm):
    inputs = inputs_of(vlm)
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]
    broken = type(inputs)(**{**vars(inputs), "pixel_values": inputs.pixel_values[:4]})
    with pytest.raises(Exception):
        collect_hidden_states(vlm.model, broken, (1,))
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in vlm.model.modules()]


def test_the_weights_are_frozen_and_no_graph_is_built(vlm):
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    assert not vlm.encode(inputs_of(vlm), (1,)).states.requires_grad


def test_a_folder_says_what_it_is(vlm, vlm_folder):
    assert (vlm.num_layers, vlm.width, vlm.name) == (4, 128, "Qwen3-VL-tiny")


def test_sharded_and_whole_folders_load_the_same(vlm, vlm_folder, tmp_path):
    folder = sharded(vlm_folder, tmp_path / "sharded")
    inputs = inputs_of(vlm)
    assert torch.equal(VLM.load(folder).encode(inputs, (4,)).states, vlm.encode(inputs, (4,)).states)


def sharded(source, folder):
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for shard, keys in shards.items():
        save_file({key: weights[key] for key in keys}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_missing_or_truncated_shard_is_named(vlm_folder, tmp_path):
    folder = sharded(vlm_folder, tmp_path / "sharded")
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000])
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors: .*truncated.*got 5000 bytes"):
        VLM.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match="no model-00002-of-00002.safetensors"):
        VLM.load(folder)


def test_a_shard_outside_of_the_folder_is_refused(vlm_folder, tmp_path):
    folder = sharded(vlm_folder, tmp_path / "sharded")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    with pytest.raises(UserError, match="a shard lies outside"):
        VLM.load(folder)


def test_a_folder_saved_by_transformers_loads_the_same(vlm, tmp_path):
    vlm.model.save_pretrained(tmp_path / "saved")
    vlm.processor.save_pretrained(tmp_path / "saved")
    again, inputs = VLM.load(tmp_path / "saved"), inputs_of(vlm)
    assert torch.equal(inputs_of(again).input_ids, inputs.input_ids)
    assert torch.equal(again.encode(inputs, (4,)).states, vlm.encode(inputs, (4,)).states)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "video_preprocessor_config.json", "model.safetensors"])
def test_a_missing_file_is_named(vlm_folder, tmp_path, name):
    shutil.copytree(vlm_folder, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        VLM.load(tmp_path / "m")


def test_another_model_is_refused_by_name(vlm_folder, tmp_path):
    shutil.copytree(vlm_folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for model_type in ("qwen2_5_vl", "qwen3_vl_moe", "llama"):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        with pytest.raises(UserError, match=f"another model; got {model_type}"):
            VLM.load(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("<html>")
    with pytest.raises(UserError, match="config.json: this is no JSON file"):
        VLM.load(tmp_path / "m")


def test_missing_weights_are_named(vlm_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(vlm_folder, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    del weights["model.language_model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no language_model.layers.2.mlp.up_proj.weight"):
        VLM.load(tmp_path / "m")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such VLM folder"):
        VLM.load(tmp_path / "nowhere")


def test_without_transformers_the_message_says_what_to_install(vlm_folder, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"expected transformers>=4.57"):
        VLM.load(vlm_folder)
