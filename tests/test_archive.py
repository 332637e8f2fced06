"""The archive for the ComfyUI registry: complete, described, and free of code that executes other code.

These checks are stricter than the registry's own.
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import mive_core

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    "subprocess",
    "multiprocessing",
    "ctypes",
    "cffi",
    "runpy",
    "code",
    "codeop",
    "pty",
    "importlib",
    "pkgutil",
    "imp",
    "pip",
    "ensurepip",
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "socket",
    "socketserver",
    "ssl",
    "http",
    "urllib",
    "ftplib",
    "smtplib",
    "telnetlib",
    "xmlrpc",
    "asyncio",
    "requests",
    "httpx",
    "aiohttp",
    "urllib3",
    "builtins",
    "huggingface_hub",
}
NAMES = {"eval", "exec", "compile", "__import__", "__builtins__", "breakpoint", "globals"}
PATHS = re.compile(r"os\.(system|popen|startfile|fork\w*|exec\w+|spawn\w+|posix_spawn\w*)|sys\.modules|torch\.(load|hub)(\..*)?|torch\.serialization\b.*")
KEYWORDS = {"allow_pickle", "trust_remote_code"}
MAX_BYTES = 36e6


def archived() -> list[Path]:
    """Returns the tracked files that .comfyignore does not exclude, which comfy-cli packs."""
    tracked, ignored = (
        set(subprocess.run(["git", "ls-files", "-z", "--cached", *options], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"))
        for options in ([], ["--ignored", "--exclude-from=.comfyignore"])
    )
    return sorted(ROOT / name for name in tracked - ignored if name)


FILES = archived()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def violations(source: str) -> list[str]:
    """Returns the forbidden constructs in a Python source, in order of lines. Names are resolved through `import as` and `from import`."""
    tree, found, imported = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def path_of(node: ast.AST) -> str:
        """`o.path.join` -> os.path.join, `getattr(os, "system")` -> os.system; "" for other nodes."""
        if isinstance(node, ast.Name):
            return imported.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{path_of(node.value)}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
            return f"{path_of(node.args[0])}.{node.args[1].value}"
        return ""

    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if not node.level else []
            found += [(line, f"imports {name}") for name in names if name.split(".")[0] in MODULES]
            if isinstance(node, ast.ImportFrom) and not node.level:
                found += [(line, f"imports {node.module}.{alias.name}") for alias in node.names if PATHS.fullmatch(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Name) and node.id in NAMES:
            found.append((line, f"names {node.id}"))
        elif isinstance(node, (ast.Attribute, ast.Call)) and PATHS.fullmatch(path_of(node)):
            found.append((line, f"uses {path_of(node)}"))
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            found.append((node.value.lineno, f"sets {node.arg}"))
    return [f"line {line} {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_executes_no_other_code(path):
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "import subprocess",
        "from subprocess import run as go",
        "import os as o\no.system('ls')",
        "from os import system",
        "import os\ngetattr(os, 'popen')('ls')",
        "import os\nos.execv('a', [])",
        "import socket",
        "import urllib.request",
        "import pickle",
        "import importlib",
        "from importlib import import_module",
        "import pip",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import torch as t\nt.hub.load('a', 'b')",
        "from torch.serialization import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "f(trust_remote_code=anything)",
        "def f():\n    if 1:\n        import ctypes",
    ],
)
def test_violations_are_found(source):
    assert len(violations(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "model.eval()",
        "'eval(1) pickle'",
        "import os.path\nos.path.join('a')",
        "from .vlm import load",
        "import torch\ntorch.ones(1)",
        "numpy.load('x', allow_pickle=False)",
        "from safetensors.torch import load_file",
    ],
)
def test_harmless_code_passes(source):
    assert violations(source) == []


def test_a_violation_in_a_real_file_is_found():
    """A file of the archive, with a forbidden call added."""
    source = (ROOT / "nodes" / "dit.py").read_text(encoding="utf-8")
    assert violations(source + "\nimport os\nos.system('ls')\n") == [f"line {source.count(chr(10)) + 3} uses os.system"]


SCRIPT_VIOLATIONS = re.compile(r"\beval\b|\bFunction\(|\bimport\(|innerHTML|insertAdjacentHTML|document\.write|https?:|\bfetch\(|XMLHttpRequest|cookie|atob")


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_scripts_of_the_page_run_no_text_and_call_no_other_server(path):
    source = path.read_text(encoding="utf-8")
    assert not SCRIPT_VIOLATIONS.search(source)
    for line in ("eval(text);", "box.innerHTML = text;", 'fetch("/view");', 'import("./more.js");'):
        assert SCRIPT_VIOLATIONS.search(source + line), line


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
        "subgraphs/Video Edit (MiVE).json",
        "subgraphs/Video Edit Frame MiVE.json",
        "workflows/MiVE 1 Edit a Video.json",
        "workflows/MiVE 1 Edit a Video.jpg",
        "mive_core/assets/tiny/dit.safetensors",
        "mive_core/assets/samples/bigbuckbunny_33f.mp4",
        "mive_core/assets/samples/bigbuckbunny_grass.mp4",
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
