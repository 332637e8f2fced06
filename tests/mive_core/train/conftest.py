"""Every recipe of configs/, read; and what they start from, at small shapes."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from mive_core.cli import main
from mive_core.config import VLM_SIZES
from mive_core.formats.checkpoint import read_config
from mive_core.train.recipe import Recipe, parse_recipe, read_recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CLASSES = {
    "vae": ("embedded.vae_task", "VAERecipe"),
    "vlm": ("embedded.vlm_task", "VLMRecipe"),
    "dit": ("embedded.dit_task", "DiTRecipe"),
    "edit": ("train.edit_task", "EditRecipe"),
    "distill": ("train.distill", "DistillRecipe"),
    "small_wan": ("study.small_wan", "SmallWanRecipe"),
    "study_vlm": ("study.layers.vlm_task", "StudyVLMRecipe"),
}


@pytest.fixture(scope="session")
def recipes() -> dict[str, Recipe]:
    """By name; an unknown key fails."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        values = read_recipe(path)
        module, name = CLASSES[values["task"]]
        cls = getattr(import_module(f"mive_core.{module}"), name)
        found[path.stem] = parse_recipe(cls, values, path)
    return found


@pytest.fixture(scope="session")
def small_wan(tmp_path_factory) -> Path:
    """A Wan of random weights in one file, of true shapes but for their sizes."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(3)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=32, freq_dim=64, ffn_dim=1024, num_layers=2
    ).save_pretrained(folder)
    return folder / "diffusion_pytorch_model.safetensors"


@pytest.fixture
def tiny_vlm_sizes(monkeypatch, random_models) -> None:
    """Every --vlm stands for the tiny VLM."""
    config = read_config(random_models / "dit.safetensors")
    for name in VLM_SIZES:
        monkeypatch.setitem(VLM_SIZES, name, (config.vlm_width, config.vlm_num_layers))


@pytest.fixture
def vae_and_vlm(random_models, tmp_path) -> Path:
    """The folder models/ with what is not made from Wan's weights; as a download has it."""
    folder = tmp_path / "models"
    shutil.copytree(random_models / "vlm", folder / "vlm")
    shutil.copyfile(random_models / "vae.safetensors", folder / "vae.safetensors")
    return folder


@pytest.fixture
def from_wan(small_wan, vae_and_vlm, tiny_vlm_sizes, tmp_path) -> Path:
    """A folder with models/, made from Wan's weights, and a cache of two pairs, both by the documented commands."""
    for command in (
        f"init-from-wan {small_wan} {vae_and_vlm}/dit.safetensors",
        f"data synth --output {tmp_path}/pairs --num 2 --split train --size 160x96 --frames 17",
        f"data cache --manifest {tmp_path}/pairs/pairs.jsonl --models {vae_and_vlm} --output {tmp_path}/cache --states fp8",
    ):
        assert main(command.split()) == 0, command
    return tmp_path
