"""The tiny models with random weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from mive_core.attention import torch_attention
from mive_core.config import PRESETS
from mive_core.dit import MiVEDiT
from mive_core.embedded.vlm_folder import write_tiny_folder
from mive_core.formats.checkpoint import save_dit
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


@pytest.fixture(scope="session")
def random_models(tmp_path_factory, vlm_folder) -> Path:
    """The three models at their tiny sizes, weights random."""
    folder = tmp_path_factory.mktemp("random") / "models"
    folder.mkdir()
    shutil.copytree(vlm_folder, folder / "vlm")
    torch.manual_seed(1)
    config = replace(PRESETS["tiny"], num_blocks=1, steps=2)
    save_dit(folder / "dit.safetensors", MiVEDiT(config, operations=torch.nn, attention=torch_attention).state_dict(), config)
    save_file(AutoencoderKLWan(base_dim=8).state_dict(), folder / "vae.safetensors")
    return folder
