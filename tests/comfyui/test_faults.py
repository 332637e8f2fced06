"""Faults in the middle of a run: memory that gives out, numbers that are none, a user who presses Cancel. The next run is as if nothing had been."""

import shutil
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

STEPS = 3
ONE_PROMPT = """
import sys, tempfile
from pathlib import Path
sys.path.append(sys.argv[1])
from load import FOLDERS, ROOT, prompt_of
from serving import Server
with tempfile.TemporaryDirectory() as base:
    for folder in FOLDERS:
        (Path(base) / folder).mkdir(parents=True)
    (Path(base) / "custom_nodes" / "mive").symlink_to(ROOT, target_is_directory=True)
    server = Server.start(Path(sys.argv[2]), Path(base))
    try:
        assert server.run(prompt_of(0)[0])["status"]["status_str"] == "success"
    finally:
        server.stop()
"""


def sample(pack, loaded, **changed) -> torch.Tensor:
    given = dict(model=loaded.model, positive=loaded.positive, negative=loaded.negative, latent=loaded.latent, seed=3, steps=STEPS, cfg=1.0)
    return pack.run("MiVESampler", **{**given, **changed})[0]["samples"]


def read(pack, loaded, request_) -> torch.Tensor:
    return pack.run("MiVEEncode", vlm=loaded.vlm, instruction="make it blue", fps=8.0, source=request_.source.frames, reference=request_.reference[None])[0][0][
        0
    ]


def encode(pack, loaded, request_) -> torch.Tensor:
    positive, *_ = pack.run(
        "MiVEReferenceLatents",
        positive=loaded.positive,
        negative=loaded.negative,
        vae=loaded.vae,
        source=request_.source.frames,
        reference=request_.reference[None],
        width=64,
        height=48,
        length=17,
    )
    return positive[0][1]["mive_source_latents"]


@contextmanager
def at_call(module: torch.nn.Module, number: int, act):
    """Runs `act` where the module is called for the number-th time, and every time after."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) >= number:
            act()

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def run_out():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def phases(pack, loaded, request_) -> dict:
    """Phase -> (the module it spends its time in, the call at which it fails, the run)."""
    return {
        "step": (loaded.model.model.diffusion_model.blocks[4], 2, lambda: sample(pack, loaded)),
        "encoder": (loaded.vlm.patcher.model.model.language_model.layers[2], 1, lambda: read(pack, loaded, request_)),
        "VAE": (loaded.vae.first_stage_model.encoder, 1, lambda: encode(pack, loaded, request_)),
    }


@pytest.mark.parametrize("phase", ["step", "encoder", "VAE"])
def test_out_of_memory_reaches_comfyui_and_the_rerun_is_clean(pack, loaded, request_, phase):
    """ComfyUI tells it by its type, says so to the user and unloads all models. Its VAE first tries again in tiles."""
    import comfy.model_management

    module, number, run = phases(pack, loaded, request_)[phase]
    clean = run()
    with at_call(module, number, run_out) as calls, pytest.raises(Exception) as caught:
        run()
    assert comfy.model_management.is_oom(caught.value) and len(calls) >= number
    comfy.model_management.unload_all_models()
    assert torch.equal(run(), clean)


def test_the_vae_goes_on_in_tiles_where_memory_is_short(pack, loaded, request_):
    clean = encode(pack, loaded, request_)
    failed = []

    def once():
        if not failed:
            failed.append(1)
            run_out()

    with at_call(loaded.vae.first_stage_model.encoder, 1, once):
        tiled = encode(pack, loaded, request_)
    assert failed and tiled.shape == clean.shape and tiled.isfinite().all()


@pytest.mark.parametrize("phase", ["step", "encoder"])
def test_cancel_is_heard_in_the_middle_and_the_rerun_is_clean(pack, loaded, request_, phase):
    """The VLM looks up before each of its layers: on a CPU an 8B reads for minutes. The sampler looks up at each step."""
    import comfy.model_management

    module, number, run = phases(pack, loaded, request_)[phase]
    clean = run()
    with at_call(module, number, lambda: comfy.model_management.interrupt_current_processing(True)) as calls:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run()
    assert len(calls) == number
    comfy.model_management.interrupt_current_processing(False)
    assert torch.equal(run(), clean)


def broken(loaded):
    """A MODEL with a weight that is no number."""
    model = loaded.model.clone()
    key = "diffusion_model.blocks.3.ffn.2.weight"
    model.add_patches({key: ("diff", (torch.full(tuple(model.model.state_dict()[key].shape), float("nan")),))})
    return model


@torch.inference_mode()
def test_numbers_that_are_none_never_become_a_black_video(pack, loaded):
    """By our sampler and by the stock ones alike."""
    from comfy_extras import nodes_custom_sampler as custom

    import nodes

    model, said = broken(loaded), "the latents are no longer finite"
    plain = sample(pack, loaded)
    with pytest.raises(ValueError, match=said):
        sample(pack, loaded, model=model)
    with pytest.raises(ValueError, match=said):
        nodes.KSampler().sample(model, 0, 2, 1.0, "euler", "simple", loaded.positive, loaded.negative, loaded.latent)
    (guider,) = custom.BasicGuider.execute(model, loaded.positive).args
    (sigmas,) = custom.BasicScheduler.execute(model, "simple", 2, 1.0).args
    (euler,) = custom.KSamplerSelect.execute("euler").args
    with pytest.raises(ValueError, match=said):
        custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(1), guider, euler, sigmas, loaded.latent)
    assert torch.equal(sample(pack, loaded), plain)


@pytest.mark.parametrize("found", [None, types.ModuleType("transformers")], ids=["absent", "too old to know Qwen3-VL"])
def test_transformers_that_cannot_read_qwen3_vl(pack, monkeypatch, found):
    """The pack is there all the same; the node that needs it says which version, and how to get it."""
    monkeypatch.setitem(sys.modules, "transformers", found)
    with pytest.raises(ValueError) as caught:
        pack.run("MiVELoadVLM", model="Qwen3-VL-random")
    assert "transformers>=4.57" in str(caught.value) and "pip install" in str(caught.value)


def test_without_a_network_a_server_runs_the_whole_graph(comfyui):
    """In a network namespace of its own, which holds nothing but this machine's own address."""
    alone = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("the system lets nobody take the network away")
    run = subprocess.run([*alone, sys.executable, "-c", ONE_PROMPT, str(Path(__file__).parent), str(comfyui)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
