"""The archive for the ComfyUI registry is complete and described."""

import ast
import re

import pytest
from archive import FILES, ROOT, SOURCES

import mive_core

MAX_BYTES = 36e6


def test_relative_imports_stay_inside_the_archive():
    """No file in the archive imports a file that .comfyignore excludes."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1].joinpath(*(node.module or "").split(".")) if node.module else path.parents[node.level - 1]
                candidates = [folder] if node.module else [folder / alias.name for alias in node.names]
                for target in candidates:
                    assert target.with_suffix(".py") in FILES or target / "__init__.py" in FILES, (path, ast.unparse(node))


def test_contains_what_comfyui_needs_and_no_more():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert names >= {
        "__init__.py",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements.txt",
        "web/docs/MiVESampler.md",
        "web/js/node_text.js",
        "workflows/mive_quickstart.json",
        "workflows/mive_quickstart.jpg",
        "mive_core/assets/tiny/dit.safetensors",
        "mive_core/assets/samples/bigbuckbunny_33f.mp4",
    }
    left_out = (
        "tests/",
        ".ci/",
        ".github/",
        "docs/",
        "configs/",
        "results/",
        "mive_core/embedded/",
        "mive_core/bench/",
        "mive_core/commands/",
        "mive_core/cli.py",
        "mive_core/__main__.py",
    )
    assert not [name for name in names if name.startswith(left_out)]
    core = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mive_core").rglob("*.py")}
    assert {name for name in core if not name.startswith(left_out)} <= names  # including the trainer, which MiVE Train LoRA runs
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES


def test_is_described_for_the_registry():
    tomllib = pytest.importorskip("tomllib")
    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = described["project"], described["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*", project["name"]) and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["license"] == "Apache-2.0" and project["classifiers"] == ["Operating System :: OS Independent"]
    assert project["version"] == mive_core.__version__  # what `mive --version` prints
    assert comfy["PublisherId"] and comfy["DisplayName"] and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_requirements_leave_torch_alone_and_cap_nothing():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert lines and all(re.fullmatch(r"[a-z0-9-]+>=[\d.]+", line) and not line.startswith("torch") for line in lines), lines
