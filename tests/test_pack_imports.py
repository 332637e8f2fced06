"""Rules for the pack's own files: what they may import re
import re
import and how long they may be. Needs no ComfyUI."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py"))]
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "node_helpers", "nodes", "server"}
NUMERIC = {"torch", "numpy", "einops"}
FORBIDDEN = {"pickle", "socket", "subprocess", "importlib", "urllib", "requests", "ctypes"}
MAX_LINES = 150


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports(path):
    """Imports inside the pack are relative, because ComfyUI mounts it under a name made from its path; transformers is imported by the first VLM."""
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
            assert package in HOST | NUMERIC | (sys.stdlib_module_names - FORBIDDEN), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    """At most MAX_LINES lines, not counting `define_schema` methods: a schema is a list, not logic."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    schemas = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "define_schema"]
    num_schema_lines = sum((node.end_lineno or 0) - node.lineno + 1 for node in schemas)
    assert len(path.read_text(encoding="utf-8").splitlines()) - num_schema_lines <= MAX_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__", "print"}


def test_the_pack_exports_only_the_entrypoint():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert [ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))] == ["from .nodes import comfy_entrypoint"]
    assert "NODE_CLASS_MAPPINGS" not in (ROOT / "__init__.py").read_text()  # ComfyUI would then ignore comfy_entrypoint, even if it is empty


def test_the_core_does_not_import_comfyui():
    """Only nodes/ touches ComfyUI."""
    for path in (ROOT / "mive_core").rglob("*.py"):
        assert not re.search(r"\bimport comfy\b", path.read_text(encoding="utf-8")), path  # comfy_kitchen is a library of its own
