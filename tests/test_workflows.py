"""The workflow files: consistent, tidily laid out, and with a note that says which model file goes where. Needs no ComfyUI."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "workflows").glob("*.json"))
NAMES = {"mive_quickstart", "mive_720p", "mive_stock_sampler", "mive_long_video", "mive_layer_study", "mive_fewstep", "mive_train_lora", "mive_keyframes"}
TITLE = 30  # height in pixels of a node's title bar, which is above the node's position
NOTE = "MarkdownNote"
DRAWN_HEIGHTS = {  # below the title bar, with the node's output after a run; measured in the browser with the new (Vue) nodes
    "MiVELoadDiT": 110,
    "MiVELoadVLM": 110,
    "VAELoader": 62,
    "GetVideoComponents": 94,
    "ImageFromBatch": 90,
    "EmptyImage": 146,
    "ImageBlend": 110,
    "MiVEReferenceLatents": 298,
    "MiVESampler": 314,
    "VAEDecode": 54,
    "MiVEKeepSourceDetail": 230,
    "CreateVideo": 110,
    "WanContextWindowsManual": 250,
    "ModelSamplingSD3": 62,
    "KSampler": 262,
    "MiVELoadLoRA": 236,
    "PreviewImage": 260,
    "MiVELayerSelect": 236,
    "SaveVideo": 340,
    "MiVETrainLoRA": 866,
    "LoadImage": 326,
    "ImageStitch": 150,
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def workflow(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def note_of(workflow: dict) -> str:
    (text,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == NOTE)
    return text


def box(node: dict) -> tuple:
    """Returns left, top, right and bottom of the drawn node."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def group_box(group: dict) -> tuple:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: tuple, b: tuple) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def test_all_are_there():
    assert {path.stem for path in FILES} == NAMES


def test_every_node_of_the_pack_is_used():
    """The pack's nodes are those with a help page, as a test with ComfyUI checks. MiVE Init From Wan is used for training only."""
    used = {node["type"] for path in FILES for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    ours = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert ours - used == {"MiVEInitFromWan"}


def test_links_are_consistent(workflow):
    """Both ends of every link refer to it, and every connected slot has a link."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and workflow["last_node_id"] == max(nodes)
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"]) and workflow["last_link_id"] == max(links)
    for number, source, out, target, slot, kind in links.values():
        output, entry = nodes[source]["outputs"][out], nodes[target]["inputs"][slot]
        assert number in output["links"] and entry["link"] == number
        assert entry["type"] == kind and output["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    for node in nodes.values():
        assert all(links[n][1:3] == [node["id"], index] for index, output in enumerate(node["outputs"]) for n in output["links"])
        assert all(links[entry["link"]][3:5] == [node["id"], slot] for slot, entry in enumerate(node["inputs"]) if entry["link"] is not None)


def test_preflight_counts_the_steps_that_are_made(workflow):
    """0 is the number of the model's own; the embedded one's is 4."""
    preflight = {node["widgets_values"][-1] or 4 for node in workflow["nodes"] if node["type"] == "MiVEPreflight"}
    samplers = {node["widgets_values"][2] for node in workflow["nodes"] if node["type"] in ("MiVESampler", "KSampler")}
    assert preflight == samplers and len(samplers) == 1


def test_nodes_are_as_high_as_they_are_drawn(workflow):
    """The new (Vue) nodes are taller than the classic ones, and cover the nodes below if the file gives a smaller height."""
    for node in workflow["nodes"]:
        assert node["size"][1] >= DRAWN_HEIGHTS.get(node["type"], 0), (node["id"], node["type"])


def test_nothing_overlaps(workflow):
    for a, b in combinations(workflow["nodes"], 2):
        assert not overlap(box(a), box(b)), (a["id"], a["type"], b["id"], b["type"])
    for a, b in combinations(workflow["groups"], 2):
        assert not overlap(group_box(a), group_box(b)), (a["title"], b["title"])


def test_every_node_lies_in_one_titled_group(workflow):
    assert all(group["title"].strip() for group in workflow["groups"])
    for node in workflow["nodes"]:
        containing = [group["title"] for group in workflow["groups"] if inside(box(node), group_box(group))]
        touched = [group["title"] for group in workflow["groups"] if overlap(box(node), group_box(group))]
        assert containing == touched and len(containing) == (node["type"] != NOTE), (node["id"], node["type"], touched)


def test_the_note_names_every_file(workflow):
    """The note names embedded models in bold, and for every other file the folder it goes into."""
    note = note_of(workflow)
    loaders = [node for node in workflow["nodes"] if "Load" in node["type"] and node["type"] != "LoadVideo"]
    assert len(loaders) >= 3
    for node in loaders:
        name = node["widgets_values"][0]
        assert f"**{name}**" in note if name.startswith("tiny/") else f"/{name}" in note and "models/" in note, name


def test_the_note_is_readable_in_both_canvases(workflow):
    """No code spans: with the new nodes, they are drawn blue on blue in a coloured note."""
    assert "`" not in note_of(workflow)


def test_offered_downloads_are_named_in_the_note(workflow):
    note = note_of(workflow)
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", []):
            assert model["name"] in node["widgets_values"] and model["url"].endswith("/" + model["name"])
            assert f"models/{model['directory']}/{model['name']}" in note


def test_has_a_thumbnail(path):
    """The template browser shows the .jpg file of the same name, as a square."""
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size < 100_000
    with Image.open(picture) as image:
        assert image.format == "JPEG" and image.width == image.height >= 256
