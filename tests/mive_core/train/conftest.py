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
def from_wan(random_models, tmp_path_factory) -> Path:
    """A folder that the documented commands made at small shapes: a converted Wan, the same in 8 bits, VAE, VLM, and a cache of two pairs."""
    folder = tmp_path_factory.mktemp("from_wan")
    (folder / "models").mkdir()
    shutil.copytree(random_models / "vlm", folder / "models" / "vlm")
    shutil.copyfile(random_models / "vae.safetensors", folder / "models" / "vae.safetensors")
    torch.manual_seed(3)
    wan = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=32, freq_dim=64, ffn_dim=1024, num_layers=2
    )
    wan.save_pretrained(folder / "wan")
    vlm = read_config(random_models / "dit.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VLM_SIZES, "tiny", (vlm.vlm_width, vlm.vlm_num_layers))
        for command in (
            f"init-from-wan {folder}/wan {folder}/models/dit.safetensors --vlm tiny",
            f"quantize {folder}/models/dit.safetensors {folder}/models/dit_fp8.safetensors",
            f"data synth --output {folder}/pairs --num 2 --split train --size 160x96 --frames 17",
            f"data cache --manifest {folder}/pairs/pairs.jsonl --models {folder}/models --output {folder}/cache --states fp8",
        ):
            assert main(command.split()) == 0, command
    return folder
