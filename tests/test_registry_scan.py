"""The code of the registry's archive executes no other code. These checks are stricter than the registry's own."""

import ast
import re

import pytest
from archive import ROOT, SOURCES

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
