"""Each workflow through a real server to its end; small files and sizes stand in for the large ones."""

import json
from pathlib import Path

import pytest
import torch
from conversion import to_prompt
from safetensors.torch import load_file

from mive_core.media.video import read_clip

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
SMALL = {
    "mive_14b_bf16.safetensors": "tiny/dit.safetensors",
    "wan_2.1_vae.safetensors": "tiny/vae.safetensors",
    "Qwen3-VL-8B-Instruct": "tiny/vlm",
    "lightx2v_T2V_14B_cfg_step_distill_v2_lora_rank64_bf16.safetensors": "random_tiny.safetensors",
}
LOADED_VLM = {"class_type": "MiVELoadVLM", "inputs": {"model": "tiny/vlm", "dtype": "default", "device": "default"}}
LARGE_SIDE, SMALL_SIZE = 192, {"width": 112, "height": 64, "length": 9}
FEW_STEPS = 6
ENDS = {  # what is saved: frames, height, width
    "MiVE 1 Edit a Video": (33, 360, 640),
    "MiVE 2 Node by Node": (17, 96, 96),
    "MiVE 8 720p with a 14B Model": (9, 64, 112),
    "MiVE 5 Stock KSampler": (17, 96, 96),
    "MiVE 4 Long Video": (33, 96, 96),
    "MiVE 6 Compare VLM Layers": (17, 96, 4 * 96 + 3 * 4),
    "MiVE 9 Few Steps with a 14B Model": (9, 64, 112),
    "MiVE 7 Train a LoRA": (17, 96, 2 * 96 + 4),
    "MiVE 3 Two Edited Frames": (33, 96, 96),
}
RESOLVED = {"Layers: first + last": "1, 4", "Layers: evenly spaced 2": "1, 4", "Layers: first two": "1, 2", "Layers: last two": "3, 4"}


def workflow(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def queue(server):
    """Workflow's name -> (the prompt, its entry in the history, the frames it saved)."""
    info = server.get("/object_info")

    def run(name: str, **changed) -> tuple[dict, dict, torch.Tensor]:
        prompt = to_prompt(workflow(name), info)
        for node in prompt.values():
            if node["class_type"] == "MiVEVLMFromCLIP":  # test_clip.py has this node: ComfyUI makes none but the 4B and 8B models
                assert prompt[node["inputs"]["clip"][0]]["class_type"] == "CLIPLoader"
                node |= LOADED_VLM
            values = node["inputs"]
            values |= {key: SMALL[value] for key, value in values.items() if isinstance(value, str) and value in SMALL}
            if node["class_type"] == "MiVEPreflight" and values["width"] > LARGE_SIDE:
                values |= SMALL_SIZE
            if isinstance(values.get("steps"), int):
                values["steps"] = min(values["steps"], FEW_STEPS)
            values |= {key: value for key, value in changed.items() if key in values}
        entry = server.run(prompt)
        assert entry["status"]["status_str"] == "success", entry["status"]
        (number,) = (number for number, node in prompt.items() if node["class_type"] == "SaveVideo")
        (saved,) = entry["outputs"][number]["images"]
        return prompt, entry, read_clip(server.base / "output" / saved["subfolder"] / saved["filename"]).frames

    return run


def test_all_are_run():
    assert ENDS.keys() == {path.stem for path in FOLDER.glob("*.json")}


def test_all_are_listed_and_served_with_thumbnails(server):
    assert ENDS.keys() == set(server.get("/workflow_templates")["mive"])
    for name in ENDS:
        assert json.loads(server.text(f"/api/workflow_templates/mive/{name}.json")) == workflow(name)
        assert server.bytes(f"/api/workflow_templates/mive/{name}.jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("name", ENDS)
def test_runs_to_its_end(queue, name):
    prompt, entry, frames = queue(name)
    assert tuple(frames.shape) == (*ENDS[name], 3) and frames.std() > 0.01
    shown = {prompt[number]["class_type"] for number in entry["outputs"]}
    assert shown >= {"SaveVideo", "MiVEPreflight", "MiVETrainLoRA" if name == "MiVE 7 Train a LoRA" else "PreviewImage"}
    assert ("MiVELayerSelect" in shown) == (name != "MiVE 1 Edit a Video")  # there the layers are those of the checkpoint


def decoded(server, prompt: dict) -> dict[str, torch.Tensor]:
    """The latents that each VAE Decode is given, by its number; saved by a node that keeps every bit, which a video does not."""
    keep = {
        f"9{number}": {"class_type": "SaveLatent", "inputs": {"samples": node["inputs"]["samples"], "filename_prefix": f"decoded_{number}"}}
        for number, node in prompt.items()
        if node["class_type"] == "VAEDecode"
    }
    entry = server.run({**prompt, **keep})
    assert entry["status"]["status_str"] == "success", entry["status"]
    saved = {number.removeprefix("9"): entry["outputs"][number]["latents"][0] for number in keep}
    return {number: load_file(server.base / "output" / at["subfolder"] / at["filename"])["latent_tensor"] for number, at in saved.items()}


def test_the_stock_chain_gives_the_quickstarts_latents(server, queue):
    (stock,), (ours,) = (decoded(server, queue(name)[0]).values() for name in ("MiVE 5 Stock KSampler", "MiVE 2 Node by Node"))
    assert torch.equal(stock, ours) and ours.std() > 0.01


def test_the_long_video_is_sampled_in_windows(queue, server):
    before = len(server.log.read_text())
    queue("MiVE 4 Long Video", seed=1)
    assert "Context length 5 with overlap 2 for 9 frames" in server.log.read_text()[before:]


def test_each_layer_choice_is_two_layers_of_the_vlm(server, queue):
    """The choices that mean the same layers give the same latents, the others do not."""
    prompt, entry, _ = queue("MiVE 6 Compare VLM Layers")
    titles = {str(node["id"]): node.get("title") for node in workflow("MiVE 6 Compare VLM Layers")["nodes"]}
    said = {titles[number]: output["text"][0] for number, output in entry["outputs"].items() if prompt[number]["class_type"] == "MiVELayerSelect"}
    assert {title: text.removeprefix("layers ").split(" of 4")[0] for title, text in said.items()} == RESOLVED
    latents = {titles[number]: tensor for number, tensor in decoded(server, prompt).items()}
    paper = latents.pop("Decode: first + last")
    assert {title: torch.equal(paper, other) for title, other in latents.items()} == {
        "Decode: evenly spaced 2": True,
        "Decode: first two": False,
        "Decode: last two": False,
    }


def test_the_lora_finds_its_layers(server, queue):
    before = len(server.log.read_text())
    (with_it,), (without,) = (decoded(server, queue("MiVE 9 Few Steps with a 14B Model", strength_model=strength)[0]).values() for strength in (1.0, 0.0))
    assert not torch.equal(with_it, without)
    assert "lora key not loaded" not in server.log.read_text()[before:]


def test_the_trained_lora_is_in_the_edit(server, queue):
    """Its name comes over a wire; the two halves of the picture are the two edits, and what was trained lies in models/loras."""
    (server.base / "models" / "loras" / "mive_neon.safetensors").unlink(missing_ok=True)
    prompt, _entry, frames = queue("MiVE 7 Train a LoRA", rank=4, resume="start anew")
    without, with_it = decoded(server, prompt).values()
    assert (without - with_it).abs().mean() > 1e-3
    weights = load_file(server.base / "models" / "loras" / "mive_neon.safetensors")
    assert len(weights) == 144 and {min(tensor.shape) for tensor in weights.values()} == {4}
    assert (frames[:, :, :96] - frames[:, :, -96:]).abs().mean() > 1e-3
