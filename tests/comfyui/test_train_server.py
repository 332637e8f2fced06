"""Training as a user of the browser gets it: queued, cancelled, queued again, and its LoRA in the next node over a wire."""

import json
import shutil
import time

import pytest
from safetensors.torch import load_file

NAME = "trained_served.safetensors"
TRAIN = {
    "pairs": "mive_sample_pairs",
    "model": "tiny/dit.safetensors",
    "vlm": "tiny/vlm",
    "vae": "tiny/vae.safetensors",
    "lora_name": NAME,
    "width": 32,
    "height": 32,
    "length": 5,
    "steps": 4,
    "batch_size": 1,
    "learning_rate": 0.01,
    "rank": 4,
    "alpha": 0.0,
    "seed": 0,
    "gradient_checkpointing": False,
    "offload": False,
    "dtype": "fp32",
    "resume": "continue",
}


@pytest.fixture
def folder(server):
    """Where the training's checkpoints are; all of it is taken away afterwards."""
    folder = server.base / "output" / "mive_training" / NAME.removesuffix(".safetensors")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    (server.base / "models" / "loras" / NAME).unlink(missing_ok=True)


def training(**changed) -> dict:
    return {"1": {"class_type": "MiVETrainLoRA", "inputs": {**TRAIN, **changed}}}


def losses(folder) -> list[float]:
    log = folder / "log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.exists() else []


def test_cancel_saves_and_the_next_prompt_goes_on(server, folder):
    """The next step is waited for, and half a second; then, with as many steps as were done and a few more, it ends."""
    number = server.queue(training(steps=5000))
    while len(losses(folder)) < 5:
        time.sleep(0.05)
        assert not server.get(f"/history/{number}"), server.log.read_text()[-2000:]
    start, done = time.monotonic(), len(losses(folder))
    server.post("/interrupt", {})
    entry = server.wait(number)
    assert time.monotonic() - start < 0.5 + 3.0  # a step takes a tenth of a second on a quiet machine
    assert any(kind == "execution_interrupted" for kind, _ in entry["status"]["messages"]), entry["status"]
    kept = losses(folder)
    assert done <= len(kept) < done + 30 and [path.name for path in folder.glob("step_*")] == [f"step_{len(kept) - 1:08d}.safetensors"]
    assert not (server.base / "models" / "loras" / NAME).exists()
    entry = server.run(training(steps=len(kept) + 3))
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert losses(folder)[: len(kept)] == kept and len(losses(folder)) == len(kept) + 3
    assert len(load_file(server.base / "models" / "loras" / NAME)) == 2 * 6 * 12


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "MiVELoadLoRA"])
def test_the_name_of_the_new_file_goes_over_a_wire(server, folder, loader):
    """The file is not there when the prompt is checked, and in no dropdown; the loader behind finds it. It ends in weights of another kind than before."""
    prompt = {
        **training(),
        "2": {"class_type": "MiVELoadDiT", "inputs": {"model": "tiny/dit.safetensors", "weight_dtype": "fp32"}},
        "3": {"class_type": loader, "inputs": {"model": ["2", 0], "lora_name": ["1", 0], "strength_model": 1.0}},
        "4": {"class_type": "ModelSave", "inputs": {"model": ["3", 0], "filename_prefix": "with_lora"}},
        "5": {"class_type": "ModelSave", "inputs": {"model": ["2", 0], "filename_prefix": "without_lora"}},
    }
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", entry["status"]
    with_it, without = (load_file(sorted((server.base / "output").glob(f"{name}_lora*.safetensors"))[-1]) for name in ("with", "without"))
    changed = [key for key in without if not (with_it[key] == without[key]).all()]
    assert len(changed) == 6 * 12 and all("self_attn" in key or "ffn" in key for key in changed)


def cached(entry: dict) -> list[str]:
    """The nodes that were not run, since their outputs were there."""
    assert entry["status"]["status_str"] == "success", entry["status"]
    return next(values["nodes"] for kind, values in entry["status"]["messages"] if kind == "execution_cached")


def test_the_same_prompt_again_trains_nothing_unless_the_lora_is_gone(server, folder):
    assert cached(server.run(training())) == [] and cached(server.run(training())) == ["1"] and len(losses(folder)) == 4
    (server.base / "models" / "loras" / NAME).unlink()
    assert cached(server.run(training())) == [] and (server.base / "models" / "loras" / NAME).exists()
    assert cached(server.run(training())) == ["1"]


def test_a_failed_training_leaves_the_server_well(server, folder):
    entry = server.run(training(length=81))
    message = next(values for kind, values in entry["status"]["messages"] if kind == "execution_error")
    assert message["node_type"] == "MiVETrainLoRA" and message["exception_type"] == "mive_core.errors.UserError"
    assert "none of the pairs can be used" in message["exception_message"] and "got 17 frames; expected 81 or more" in message["exception_message"]
    assert server.run(training())["status"]["status_str"] == "success"
