"""Every recipe of configs/, read."""

from importlib import import_module
from pathlib import Path

import pytest

from mive_core.train.recipe import Recipe, parse_recipe, read_recipe

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
CLASSES = {"vae": "VAERecipe", "vlm": "VLMRecipe", "dit": "DiTRecipe", "edit": "EditRecipe"}


@pytest.fixture(scope="session")
def recipes() -> dict[str, Recipe]:
    """By name; an unknown key fails."""
    found = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        values = read_recipe(path)
        cls = getattr(import_module(f"mive_core.train.{values['task']}"), CLASSES[values["task"]])
        found[path.stem] = parse_recipe(cls, values, path)
    return found
