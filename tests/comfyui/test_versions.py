"""What differs between the versions of ComfyUI that the pack runs on, 0.29 to 0.38: each shape is put in place of the installed one."""

import sys
from types import ModuleType

import pytest
from conversion import to_prompt

FORMAT = ("COMFY_DYNAMICCOMBO_V3", {"options": [{"key": "auto", "inputs": {"required": {"codec": (["auto", "h264"], {})}}}, {"key": "gif", "inputs": {}}]})


@pytest.mark.parametrize("asks", [False, True], ids=["0.29", "0.38"])
def test_the_patcher_is_told_of_a_fast_disk_where_it_asks(pack, base, monkeypatch, asks):
    import comfy.model_patcher

    told = {}

    class Older(comfy.model_patcher.ModelPatcher):
        def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False):
            super().__init__(model, load_device, offload_device, size, weight_inplace_update)

    class Newer(comfy.model_patcher.ModelPatcher):
        def __init__(self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False):
            super().__init__(model, load_device, offload_device, size, weight_inplace_update)
            told["fast_disk"] = fast_disk

    storage = ModuleType("comfy.storage")
    storage.state_dict_fast_disk = lambda state: all(tensor.numel() for tensor in state.values())
    monkeypatch.setitem(sys.modules, "comfy.storage", storage)
    load = pack.submodule("nodes.bridge.load")
    monkeypatch.setattr(load.comfy.model_patcher, "ModelPatcher", Newer if asks else Older)
    monkeypatch.setattr(load, "HostedPatcher", Newer if asks else Older)
    patcher = load.load_dit(base / "models" / "diffusion_models" / "random.safetensors", disable_dynamic=True)
    assert told == ({"fast_disk": True} if asks else {})
    assert patcher.model.config.num_blocks == 9


@pytest.mark.parametrize(
    "inputs, prompt",
    [
        ({"required": {"prefix": ("STRING", {}), "format": (["auto"], {}), "codec": (["auto"], {})}}, {"prefix": "a", "format": "auto", "codec": "h264"}),
        (
            {"required": {"prefix": ("STRING", {}), "format": FORMAT}, "optional": {"codec": (FORMAT[0], {"options": [], "hidden": True})}},
            {"prefix": "a", "format": "auto", "format.codec": "h264"},
        ),
    ],
    ids=["0.29", "0.38"],
)
def test_a_saved_workflow_fits_both_forms_of_save_video(inputs, prompt):
    """The codec is an input of its own in 0.29 and one that the format brings with it since 0.34; as widgets both come in the same order."""
    node = {"id": 1, "type": "SaveVideo", "inputs": [], "widgets_values": ["a", "auto", "h264"]}
    assert to_prompt({"nodes": [node], "links": []}, {"SaveVideo": {"input": inputs}})["1"]["inputs"] == prompt
