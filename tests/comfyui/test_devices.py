"""ComfyUI's MultiGPU CFG Split on the one CPU, under two names: positive and negative on a device each, in a thread each.

Real: the copy of the model that our loader makes a second time for another device, its patches, the conds that go to it, the threads.
Not to be had here: a second card, weights of different dtype on it, speeds that differ, the node's own choice of devices.
"""

import pytest
import torch

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 0)  # one device; ComfyUI takes them for two


def sample(pack, loaded, **changed) -> torch.Tensor:
    given = dict(model=loaded.model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=3, steps=3, cfg=2.5)
    return pack.run("MiVESampler", **{**given, **changed})[0]["samples"]


def split(model):
    """What the node MultiGPU CFG Split does where it finds a second card."""
    import comfy.multigpu

    model = model.clone()
    with torch.inference_mode():
        copy = model.deepclone_multigpu(new_load_device=SECOND)
    copy.is_multigpu_base_clone = True
    model.set_additional_models("multigpu", [copy])
    model.match_multigpu_clones()
    comfy.multigpu.GPUOptionsGroup().register(model)
    return model


@pytest.fixture
def seen():
    """(module, how often it ran)."""
    hooks, runs = [], {}

    def watch(module: torch.nn.Module, name: str) -> dict:
        runs[name] = 0
        hooks.append(module.register_forward_pre_hook(lambda *_: runs.__setitem__(name, runs[name] + 1)))
        return runs

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("lora", [False, True])
def test_guidance_is_split_over_two_devices(pack, loaded, seen, lora):
    import nodes

    model = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded.model, "random.safetensors", 1.0)[0] if lora else loaded.model
    expected = sample(pack, loaded, model=model)
    both = split(model)
    (copy,) = both.get_additional_models_with_key("multigpu")
    assert copy.model is not both.model and type(copy) is type(both) and copy.load_device == SECOND
    watch = {"first": both.model, "second": copy.model}
    for name, which in watch.items():
        runs = seen(which.diffusion_model.blocks[0], name)
    got = sample(pack, loaded, model=both)
    assert runs == {"first": 3, "second": 1}  # of three steps only the first is guided: at times up to guided_above nothing negative is computed
    assert (got - expected).abs().max() < 1e-5


def test_the_node_leaves_one_device_alone(pack, loaded):
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    (model,) = MultiGPUCFGSplitNode.execute(loaded.model, 2).args
    assert model.get_additional_models_with_key("multigpu") == []
    assert torch.equal(sample(pack, loaded, model=model), sample(pack, loaded))
