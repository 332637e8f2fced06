"""The pack's own files: what they may import, how long they may be. Needs no ComfyUI."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "node_helpers", "nodes", "server"}
NUMBERS = {"torch", "numpy", "einops"}
NEVER = {"pickle", "socket", "subprocess", "importlib", "urllib", "requests", "ctypes"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path):
    """Relative inside the pack, because ComfyUI mounts it under a name made of its path; transformers comes with the first VLM."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        for name in names:
            package = name.split(".")[0]
            assert package in HOST | NUMBERS | (sys.stdlib_module_names - NEVER), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 150
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__", "print"}


def test_the_door_leads_to_the_nodes_alone():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))] == ["from .nodes import comfy_entrypoint"]
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text()  # even empty it would shut the door


def test_the_core_knows_no_host():
    """Only nodes/ touches ComfyUI."""
    for path in (ROOT / "mive_core").rglob("*.py"):
        assert "import comfy" not in path.read_text(encoding="utf-8"), path
