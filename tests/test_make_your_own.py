"""docs/make_your_own.md: its commands are ones that the command line takes and the recipes name, its figures are those of `mive train --plan`."""

import re
import shlex
from pathlib import Path

import pytest

from mive_core.cli import build_parser
from mive_core.config import PRESETS
from mive_core.cost.memory import weight_bytes
from mive_core.train.plan import PlanOptions, gigabytes, plan

ROOT = Path(__file__).resolve().parents[1]
PAGE, TRAINING = (ROOT / "docs" / name for name in ("make_your_own.md", "training.md"))
BOTH = ((832, 480, 81), (480, 832, 81))
PLANS = {  # as the page's and the presets' tables name them
    "lora_1p3b_1x16gb": [PlanOptions("1.3b", "4b", ((832, 480, 33),), "fp8", card="RTX 4080")],
    "lora_1p3b_1x24gb": [PlanOptions("1.3b", "4b", BOTH, "fp8", card=card) for card in ("RTX 4090", "RTX 3090")],
    "lora_14b_1x24gb": [PlanOptions("14b", "8b", BOTH, "fp8", card=card) for card in ("RTX 4090", "RTX 3090")],
    "full_1p3b_1x80gb": [PlanOptions("1.3b", "8b", BOTH, card="H100")],
    "paper_14b_8xh100": [PlanOptions("14b", "8b", ((1280, 720, 81),), "fp8", card="H100")],
}


def commands(path: Path) -> list[str]:
    """The lines of code that start with mive, without comments."""
    lines = [line.strip().split("    #")[0] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("    ", "#   "))]
    return [line.removeprefix("#").strip() for line in lines if line.removeprefix("#").strip().startswith("mive ")]


@pytest.mark.parametrize("command", commands(PAGE))
def test_every_command_of_the_page_is_taken(command):
    arguments = build_parser().parse_args(shlex.split(command)[1:])
    config = getattr(arguments, "config", None)
    assert callable(arguments.run) and (config is None or (ROOT / config).is_file())


def test_the_road_is_the_one_that_its_recipe_names():
    """The commands of a recipe's first lines are run by tests/mive_core/train/test_presets.py."""
    page = commands(PAGE)
    assert len(page) > 10
    own, large = (commands(ROOT / "configs" / f"{name}.yaml") for name in ("lora_1p3b_1x24gb", "lora_14b_1x24gb"))
    assert [line for line in page if line in own] == own and large[1] in page
    export = re.search(r"^export: (\S+)", (ROOT / "configs" / "lora_1p3b_1x24gb.yaml").read_text(), re.MULTILINE)[1]
    assert f"mive merge models/dit.safetensors {export} editor/dit.safetensors" in page and any(f"--lora {export}" in line for line in page)


@pytest.mark.parametrize("name", PLANS)
def test_the_figures_are_those_of_the_plan(name):
    reports = [plan(ROOT / "configs" / f"{name}.yaml", options) for options in PLANS[name]]
    (row,) = (line for line in TRAINING.read_text().splitlines() if line.startswith(f"| [`{name}.yaml`]"))
    memory = gigabytes(reports[0]["memory"]["total"] + reports[0]["memory"]["reserved"])
    said = " ".join(row.split("|")[3:])
    assert memory in said and f"{reports[0]['time']['hours']:.0f}" in said
    assert not reports[0]["main_memory"]["blocks_inputs"] or f"{reports[0]['main_memory']['blocks_inputs'] / 1e9:.0f} GB of main memory" in said
    _, *body = (line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ") and line.count("|") == 5)
    column = next((i for i, cell in enumerate(body[0]) if name in cell), None)
    if column is None:
        return
    cells = {line[0].strip(): line[column] for line in body}
    first = reports[0]
    assert memory in cells["memory of a card"] and gigabytes(first["disk"]["cache_bytes"]) in cells["cache of 1000 pairs"]
    assert all(f"{report['time']['hours']:.0f} on" in cells["hours of training, at 45 % of the card's peak"] for report in reports)
    assert cells["that is"].strip() == f"{first['time']['steps']} steps of {first['time']['pairs_a_step']} pairs"
    assert gigabytes(first["disk"]["output_dir_bytes"]) in cells["checkpoints on disk"]
    assert gigabytes(first["disk"]["export_bytes"]) in cells["result"]
    config = PRESETS[PLANS[name][0].preset]
    assert f"{weight_bytes(config, 2) / 1e9:.1f} GB" in cells["converted DiT on disk"]
    assert "fp8" not in cells["converted DiT on disk"] or f"{weight_bytes(config, 2, 1) / 1e9:.1f} GB in fp8" in cells["converted DiT on disk"]
