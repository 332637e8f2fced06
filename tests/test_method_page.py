"""The page of the method names places in the code: each of them is there. The diagram is plain SVG that any viewer draws."""

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE, DIAGRAM = ROOT / "docs" / "method.md", ROOT / "docs" / "method.svg"
PLACES = re.findall(r"`([\w/]+\.py)` `([\w.]+)`", PAGE.read_text(encoding="utf-8"))
IN_DIAGRAM = [  # module or class, and the name in it, as the diagram shows them
    ("prompt.py", "build_inputs"),
    ("vlm.py", "VLM.encode"),
    ("pipeline.py", "Pipeline.encode"),
    ("vae.py", "VAE"),
    ("dit/context.py", "ContextProjection"),
    ("dit/model.py", "MiVEDiT.forward"),
    ("dit/model.py", "Head"),
    ("dit/blocks.py", "Block"),
    ("dit/blocks.py", "gated_add"),
    ("reference.py", "fix_first_frame"),
    ("flow.py", "euler"),
]
ATTRIBUTES = {"dit/context.py": ("norms", "projections", "fuse"), "dit/blocks.py": ("norm1", "self_attn", "norm2", "ffn"), "dit/model.py": ("patch_embedding",)}


def names(path: str) -> set[str]:
    """Functions and classes of a module, and what is in the classes, as Class.name."""
    found = set()
    for node in ast.parse((ROOT / "mive_core" / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
            found |= {f"{node.name}.{part.target.id}" for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)}
    return found


@pytest.mark.parametrize("path, name", PLACES)
def test_every_place_of_the_page_is_there(path, name):
    assert name in names(path)


def test_the_page_names_places():
    assert len(PLACES) >= 24 and not {"MiVEDiT.nothing", "nothing"} & names("dit/model.py")


@pytest.mark.parametrize("path, name", IN_DIAGRAM)
def test_every_name_of_the_diagram_is_there(path, name):
    assert name.split(".")[-1] in DIAGRAM.read_text(encoding="utf-8") and name in names(path)


def test_the_diagrams_attributes_are_those_of_the_modules():
    text = DIAGRAM.read_text(encoding="utf-8")
    for path, attributes in ATTRIBUTES.items():
        source = (ROOT / "mive_core" / path).read_text(encoding="utf-8")
        assert all(attribute in text and f"self.{attribute} = " in source for attribute in attributes), path


def test_the_diagram_is_well_formed_and_loads_nothing():
    root = ElementTree.parse(DIAGRAM).getroot()
    text = DIAGRAM.read_text(encoding="utf-8")
    assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in text and "<script" not in text and "href" not in text
    width, height = map(float, root.get("viewBox", "").split()[2:])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        left, top = float(box.get("x", 0)), float(box.get("y", 0))
        assert left + float(box.get("width", 0)) <= width and top + float(box.get("height", 0)) <= height
