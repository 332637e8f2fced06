"""The tiny Qwen3-VL with random weights, non-zero everywhere."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mive_core.train.tiny_vlm import write_tiny_folder
from mive_core.vlm import VLM, new_model

PHRASES = ["make the red circle blue", "remove the green square on the left", "turn the scene into night"]


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Qwen3-VL-random"
    write_tiny_folder(folder, PHRASES)
    torch.manual_seed(5)
    model = new_model(folder)
    weights = {f"model.{name}": 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def vlm(vlm_folder) -> VLM:
    return VLM.load(vlm_folder)
