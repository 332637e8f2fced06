"""The import ladder, read off the syntax trees: who may import whom, and who alone may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mive_core

ROOT = Path(mive_core.__file__).parent
LADDER = (  # each may import only what stands before it
    "errors",
    "config",
    "types",
    "layers",
    "media",
    "prompt",
    "attention",
    "flow",
    "reference",
    "dit",
    "formats",
    "vlm",
    "vlm_stream",
    "conv3d",
    "vae",
    "cost",
    "registration",
    "detail",
    "anchor",
    "reference_check",
    "delivery",
    "stretches",
    "pipeline",
    "evaluation",
    "data",
    "preference",
    "train",
    "sequence_parallel",
    "embedded",
    "bench",
    "study",
    "commands",
    "parsers",
    "cli",
    "__main__",
)
ALONE = {  # a foreign package -> the files that may import it
    "transformers": {"vlm.py", "embedded/vlm_folder.py", "data/segment_person.py"},
    "diffusers": {"vae.py", "bench/against_diffusers.py", "bench/models.py", "study/small_wan.py"},
    "av": {"media/decode.py", "media/encode.py", "media/images.py", "media/sound.py"},
    "gguf": {"formats/gguf_file.py"},
    "yaml": {"train/recipe.py", "data/benchmarks.py"},
    "fsspec": {"media/remote.py"},
    "pyarrow": {"data/tables.py"},
    "ray": {"data/ray_executor.py"},
}
NEVER = {"comfy", "comfy_extras", "comfy_api", "nodes", "folder_paths", "execution", "pickle", "socket", "subprocess"}
MODULES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(0, package) of absolute imports, (1, rung) of imports within mive_core."""
    found = []
    inside = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append((0, node.module.split(".")[0]))
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1]
            names = [*base, *(node.module or "").split(".")] if node.module else [*base]
            found += [(1, names[0])] if names else [(1, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not imports(path)
        return
    assert own in LADDER, f"{own} has no place on the ladder"
    for level, name in imports(path):
        if level and name not in (own, "__version__"):
            assert name in LADDER[: LADDER.index(own)], f"{own} imports {name}, which stands after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_foreign_packages_have_one_door(path):
    name = path.relative_to(ROOT).as_posix()
    for level, package in imports(path):
        if not level:
            assert package != "mive_core", "imports inside the package are relative"
            assert package not in NEVER
            assert name in ALONE.get(package, {name}), f"{package} is imported by {ALONE.get(package)} only"


def test_the_ladder_is_seen():
    """The reader finds the imports it is to judge: an empty list would pass every test above."""
    assert (1, "errors") in imports(ROOT / "config.py")
    assert (1, "evaluation") in imports(ROOT / "commands" / "models.py")
    assert (1, "types") in imports(ROOT / "embedded" / "heldout.py")
    assert (0, "torch") in imports(ROOT / "types.py")


def test_help_needs_no_torch():
    """`mive --help` answers at once."""
    code = "import sys\nfrom mive_core.cli import build_parser\nbuild_parser().format_help()\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_root_is_off_the_path():
    """The repository's own nodes/ would shadow a host's nodes.py."""
    assert ROOT.parent not in [Path(entry or ".").resolve() for entry in sys.path]
