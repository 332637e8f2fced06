"""Through a real server: what a user of the browser gets."""

import asyncio
import copy
import json
import re
import time
import uuid
from pathlib import Path

import pytest
import torch
from conversion import to_prompt
from safetensors.torch import load_file
from serving import Refused

from mive_core.media.video import read_clip

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "MiVE 2 Node by Node.json"
EMBEDDED = {
    "tiny/dit.safetensors": ("dit.safetensors", "random.safetensors"),
    "tiny/vae.safetensors": ("vae.safetensors", "random.safetensors"),
    "tiny/vlm": ("vlm", "Qwen3-VL-random"),
}


@pytest.fixture(scope="module")
def prompt(server) -> dict:
    """The quickstart as queued. The embedded models move together: random ones stand in where one is not there yet."""
    prompt = to_prompt(json.loads(WORKFLOW.read_text()), server.get("/object_info"))
    if not all((ROOT / "mive_core" / "assets" / "tiny" / name).exists() for name, _ in EMBEDDED.values()):
        for node in prompt.values():
            node["inputs"] = {k: EMBEDDED[v][1] if isinstance(v, str) and v in EMBEDDED else v for k, v in node["inputs"].items()}
    return prompt


def of(prompt: dict, kind: str) -> dict:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def said(entry: dict) -> dict:
    """What an execution_error message holds."""
    return next(values for kind, values in entry["status"]["messages"] if kind == "execution_error")


def test_starts_without_a_warning_of_ours(server):
    started, ready, _ = server.log.read_text().partition("To see the GUI go to")  # later lines are of other tests' prompts
    lines = started.splitlines()
    assert ready and any("custom_nodes/mive" in line for line in lines)
    assert not [
        line for line in lines if "mive" in line.lower() and ("warn" in line.lower() or "error" in line.lower() or "cannot" in line.lower() or "FAILED" in line)
    ]


def test_help_pages_and_templates_are_served(server):
    info = server.get("/object_info")
    for name in (name for name in info if name.startswith("MiVE")):
        assert server.text(f"/extensions/mive/docs/{name}.md").startswith("# MiVE")
        assert server.bytes(f"/extensions/mive/docs/images/{name}.webp")[8:12] == b"WEBP"  # where the browser looks for the page's picture
    assert "MiVE 2 Node by Node" in server.get("/workflow_templates")["mive"]
    assert json.loads(server.text("/api/workflow_templates/mive/MiVE 2 Node by Node.json"))["nodes"]


def test_quickstart_runs_to_its_end(server, prompt):
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    kinds = {prompt[node]["class_type"]: output for node, output in entry["outputs"].items()}
    assert {"SaveVideo", "MiVEPreflight", "MiVEDriftReport", "MiVELayerSelect"} <= kinds.keys()
    (saved,) = kinds["SaveVideo"]["images"]
    clip = read_clip(server.base / "output" / saved["subfolder"] / saved["filename"])
    assert clip.frames.shape == (17, 96, 96, 3) and clip.frames.std() > 0.01
    assert "17 frames of 96x96" in kinds["MiVEPreflight"]["text"][0]


def latents_of(server, prompt: dict, **changed) -> torch.Tensor:
    """The quickstart's edited latents, saved by a node that keeps every bit."""
    prompt = copy.deepcopy(prompt)
    of(prompt, "MiVESampler").update(changed)
    prompt = {**prompt, "99": {"class_type": "SaveLatent", "inputs": {"samples": of(prompt, "VAEDecode")["samples"], "filename_prefix": "edited"}}}
    wanted = needed(prompt, "99")
    entry = server.run({number: node for number, node in prompt.items() if number in wanted})
    assert entry["status"]["status_str"] == "success", entry["status"]
    (saved,) = entry["outputs"]["99"]["latents"]
    return load_file(server.base / "output" / saved["subfolder"] / saved["filename"])["latent_tensor"]


def needed(prompt: dict, last: str) -> set[str]:
    found, todo = set(), [last]
    while todo:
        number = todo.pop()
        found.add(number)
        todo += [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
    return found


def test_same_seed_twice_is_bit_identical(server, prompt):
    first = latents_of(server, prompt, seed=5)
    server.post("/free", {"unload_models": True, "free_memory": True})
    latents_of(server, prompt, seed=6)
    assert torch.equal(first, latents_of(server, prompt, seed=5))


def test_a_missing_reference_is_refused_when_the_prompt_is_checked(server, prompt):
    bad = copy.deepcopy(prompt)
    for node in bad.values():
        if node["class_type"] == "MiVEEncode":
            del node["inputs"]["reference"]
    complaint = server.post("/prompt", {"prompt": bad})["node_errors"]
    errors = [error for values in complaint.values() for error in values["errors"]]
    assert {error["type"] for error in errors} == {"required_input_missing"} and {error["details"] for error in errors} == {"reference"}


def test_interrupt_ends_at_once_and_leaves_nothing_behind(server, prompt):
    before = latents_of(server, prompt, seed=8)
    start = time.monotonic()
    latents_of(server, prompt, seed=8, steps=40)
    step = (time.monotonic() - start) / 40  # a little more than it takes
    long = copy.deepcopy(prompt)
    of(long, "MiVESampler").update(steps=1000, seed=9)
    number = server.queue(long)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(3)
    start = time.monotonic()
    server.post("/interrupt", {})
    entry = server.wait(number)
    assert time.monotonic() - start < step + 0.5
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"]), entry["status"]
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(latents_of(server, prompt, seed=8), before)


@pytest.mark.parametrize(
    "kind, name, value, expected",
    [
        ("MiVELoadDiT", "model", "gone.safetensors", "models/diffusion_models"),
        ("MiVELoadVLM", "model", "../../etc", "models/text_encoders"),
        ("MiVELayerSelect", "custom", "1,,2", "column 3"),
        ("MiVESampler", "steps", -1, "min"),
        ("MiVESampler", "sampler", "none", "not in list"),
    ],
)
def test_bad_values_are_refused_when_the_prompt_is_checked(server, prompt, kind, name, value, expected):
    bad = copy.deepcopy(prompt)
    of(bad, kind)[name] = value
    if name == "custom":
        of(bad, kind)["preset"] = "custom"
    try:
        complaint = json.dumps(server.post("/prompt", {"prompt": bad})["node_errors"])  # other outputs are still good
    except Refused as error:
        complaint = str(error)
    assert expected in complaint


def test_after_an_error_the_next_prompt_succeeds(server, prompt):
    bad = copy.deepcopy(prompt)
    of(bad, "MiVEReferenceLatents")["length"] = 33
    entry = server.run(bad)
    error = said(entry)
    assert entry["status"]["status_str"] == "error" and error["node_type"] == "MiVEReferenceLatents"
    assert error["exception_type"] == "mive_core.errors.UserError"
    assert error["exception_message"].startswith("source: the clip is shorter than asked; got 17 frames; expected 33; ask for 17 or fewer")
    assert server.run(prompt)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    "node, kind, extra, said",
    [
        ("8", "MiVELayerSelect", {"preset": "custom", "count": 4, "custom": "2,-1", "vlm": ["7", 0]}, "layers 2, 4 of 4"),
        ("9", "MiVEPreflight", {"video": ["5", 0], "width": 0, "height": 0, "length": 0, "policy": "trim"}, "9 frames of 64x64\ntokens: 48 target"),
        ("10", "MiVELoadLoRA", {"model": ["6", 0], "lora_name": "random.safetensors", "strength_model": 1.0}, "random.safetensors: all 4 keys fit"),
        ("11", "MiVEDriftReport", {"source": ["5", 0], "edited": ["5", 0]}, "9 frames, in levels of 255\nkept region"),
    ],
)
def test_what_a_node_found_is_in_its_output(server, node, kind, extra, said):
    """Texts vanished from nodes when the node was cached, and when the page was reloaded: they were sent as progress.

    The page gets the output while the prompt runs, again when the node is cached, and from the list of jobs.
    """
    import aiohttp

    prompt = {
        "5": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 9, "color": 0}},
        "6": {"class_type": "MiVELoadDiT", "inputs": {"model": "random.safetensors", "weight_dtype": "default"}},
        "7": {"class_type": "MiVELoadVLM", "inputs": {"model": "tiny/vlm", "dtype": "fp32", "device": "cpu"}},
        node: {"class_type": kind, "inputs": extra},
    }
    workflow = str(uuid.uuid4())

    async def outputs() -> list[dict]:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.url}/ws?clientId=reader") as socket:
            extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
            number = server.post("/prompt", {"prompt": prompt, "client_id": "reader", "extra_data": extra})["prompt_id"]
            found = []
            async for message in socket:
                event = json.loads(message.data) if message.type is aiohttp.WSMsgType.TEXT else {"type": "binary"}
                if event["type"] == "executed" and event["data"]["node"] == node:
                    found.append(event["data"]["output"])
                elif event["type"] == "executing" and event["data"]["prompt_id"] == number and event["data"]["node"] is None:
                    return found

    (first,), (again,) = asyncio.run(outputs()), asyncio.run(outputs())
    last, _ = server.get(f"/api/jobs?status=completed,failed,cancelled&limit=3&workflow_id={workflow}")["jobs"]
    assert node in cached(server.wait(last["id"]))
    for output in (first, again, server.get(f"/api/jobs/{last['id']}")["outputs"][node]):
        (text,) = output["text"]
        assert text.startswith(said)
        assert ("images" in output) == (kind == "MiVEDriftReport")


def cached(entry: dict) -> list[str]:
    """Returns the nodes that were not run again."""
    return next(values["nodes"] for kind, values in entry["status"]["messages"] if kind == "execution_cached")


def test_the_page_gets_the_script_that_draws_texts(server):
    """It is plain JavaScript, reads the key that nodes write, and imports only what ComfyUI calls public."""
    assert [path for path in server.get("/extensions") if path.startswith("/extensions/mive/")] == ["/extensions/mive/js/node_text.js"]
    script = server.text("/extensions/mive/js/node_text.js")
    assert "output?.text" in script and '"mive.progress"' in script
    assert re.findall(r'from "([^"]+)"', script) == ["../../../scripts/app.js", "../../../scripts/api.js"]
    for name in ("app", "api"):
        assert server.text(f"/scripts/{name}.js")
