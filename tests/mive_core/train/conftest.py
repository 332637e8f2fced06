"""Every recipe of configs/, read."""

from importlib import import_module
from pathlib import Path

import pytest

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
