"""The workflow and blueprint files: consistent, tidily laid out, and with a note that says which model file goes where. Needs no ComfyUI."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "workflows").glob("*.json"))
NAMES = [
    "MiVE 1 Edit a Video",
    "MiVE 2 Node by Node",
    "MiVE 3 Two Edited Frames",
    "MiVE 4 Long Video",
    "MiVE 5 Stock KSampler",
    "MiVE 6 Compare VLM Layers",
    "MiVE 7 Train a LoRA",
    "MiVE 8 720p with a 14B Model",
    "MiVE 9 Few Steps with a 14B Model",
]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
BLUEPRINT_NAMES = ["Video Edit (MiVE)", "Video Edit Frame MiVE"]
SCHEMAS = json.loads((ROOT / "tests" / "comfyui" / "schemas.json").read_text(encoding="utf-8"))
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
    "MiVEEditVideo": 472,
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
    "MiVEPreflight": 430,
    "MiVEDriftReport": 416,
    "MiVELayerDiagnostics": 568,
}
STEPS = {"MiVESampler": 2, "MiVEEditVideo": 4, "KSampler": 2}  # of the samplers: where the number of steps stands among the values
PREVIEW_HEIGHT = 244  # that a sampler grows by where ComfyUI shows previews, until the page is reloaded; measured likewise
SUBGRAPH_INPUTS, SUBGRAPH_OUTPUTS = -10, -20  # the nodes that stand for them inside a subgraph
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def workflow(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def subgraphs_of(workflow: dict) -> dict[str, dict]:
    return {subgraph["id"]: subgraph for subgraph in workflow.get("definitions", {}).get("subgraphs", [])}


def graphs() -> dict[str, dict]:
    """Every workflow and every subgraph, in a workflow's form, by the file's name and the subgraph's."""
    found = {path.stem: read(path) for path in FILES}
    for path in (*FILES, *BLUEPRINTS):
        found |= {f"{path.stem}: {subgraph['name']}": as_workflow(subgraph) for subgraph in subgraphs_of(read(path)).values()}
    return found


def as_workflow(subgraph: dict) -> dict:
    """Links as lists; without those from and to the subgraph's own inputs and outputs, which test_subgraphs_are_connected checks."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[key] for key in keys] for link in subgraph["links"] if link["origin_id"] != SUBGRAPH_INPUTS and link["target_id"] != SUBGRAPH_OUTPUTS]
    inner = {link[0] for link in links}
    nodes = [
        {
            **node,
            "inputs": [{**slot, "link": slot["link"] if slot["link"] in inner else None} for slot in node["inputs"]],
            "outputs": [{**slot, "links": [number for number in slot["links"] if number in inner]} for slot in node["outputs"]],
        }
        for node in subgraph["nodes"]
    ]
    return {**subgraph, "nodes": nodes, "links": links, "last_node_id": subgraph["state"]["lastNodeId"], "last_link_id": max(inner)}


@pytest.fixture(params=graphs().values(), ids=graphs().keys())
def graph(request) -> dict:
    return request.param


def note_of(workflow: dict) -> str:
    (text,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == NOTE)
    return text


def box(node: dict) -> tuple:
    """Returns left, top, right and bottom of the drawn node, with a sampler's preview."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height + (PREVIEW_HEIGHT if node["type"] in STEPS else 0)


def group_box(group: dict) -> tuple:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a: tuple, b: tuple) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def test_all_are_there():
    """Their names are what the template browser and the node search show. Sorted, those that need a file that nobody has are last."""
    assert [path.stem for path in FILES] == NAMES and [path.stem for path in BLUEPRINTS] == BLUEPRINT_NAMES
    assert ["14B" in path.stem for path in FILES] == ["14b" in json.dumps([node["widgets_values"] for node in read(path)["nodes"]]) for path in FILES]


def test_every_node_of_the_pack_is_used():
    """The pack's nodes are those with a help page, as a test with ComfyUI checks. MiVE Init From Wan is used for training only."""
    used = {node["type"] for graph in graphs().values() for node in graph["nodes"]}
    ours = {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}
    assert ours - used == {"MiVEInitFromWan"}


def test_links_are_consistent(graph):
    """Both ends of every link refer to it, and every connected slot has a link."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) and graph["last_node_id"] == max(nodes)
    links = {link[0]: link for link in graph["links"]}
    assert len(links) == len(graph["links"]) and graph["last_link_id"] == max(links)
    for number, source, out, target, slot, kind in links.values():
        output, entry = nodes[source]["outputs"][out], nodes[target]["inputs"][slot]
        assert number in output["links"] and entry["link"] == number
        assert entry["type"] in (kind, "*") and output["type"] in (kind, "*")
        assert nodes[source]["order"] < nodes[target]["order"]
    for node in nodes.values():
        assert all(links[n][1:3] == [node["id"], index] for index, output in enumerate(node["outputs"]) for n in output["links"])
        assert all(links[entry["link"]][3:5] == [node["id"], slot] for slot, entry in enumerate(node["inputs"]) if entry["link"] is not None)


def test_widgets_fit_the_schemas(graph):
    """Widget values are stored by position. The sampler's seed has a second one, for what happens to it after a run."""
    for node in graph["nodes"]:
        if node["type"] not in SCHEMAS:
            assert not node["type"].startswith("MiVE")
            continue
        inputs, values = SCHEMAS[node["type"]]["inputs"], list(node["widgets_values"])
        for name, kind, _optional, _default, low, high, _step in inputs:
            if kind in WIDGETS:
                value = values.pop(0)
                assert low is None or low <= value <= high, (node["type"], name, value)
                assert node["type"] not in ("MiVESampler", "MiVEEditVideo") or name != "seed" or values.pop(0) == "fixed"
        assert not values, (node["type"], values)
        kinds = {name: kind for name, kind, *_ in inputs}
        assert all(kinds.get(slot["name"]) == slot["type"] or "." in slot["name"] for slot in node["inputs"]), node["type"]
        assert [slot["type"] for slot in node["outputs"]] == SCHEMAS[node["type"]]["outputs"]


def test_preflight_counts_the_steps_that_are_made(graph):
    """0 is the number of the model's own; the embedded one's is 4."""
    preflight = {node["widgets_values"][-1] or 4 for node in graph["nodes"] if node["type"] == "MiVEPreflight"}
    samplers = {node["widgets_values"][STEPS[node["type"]]] or 4 for node in graph["nodes"] if node["type"] in STEPS}
    assert preflight == samplers and len(samplers) <= 1


def test_nodes_are_as_high_as_they_are_drawn(graph):
    """The new (Vue) nodes are taller than the classic ones, and cover the nodes below if the file gives a smaller height."""
    for node in graph["nodes"]:
        assert node["size"][1] >= DRAWN_HEIGHTS.get(node["type"], 0), (node["id"], node["type"])


def test_nothing_overlaps(graph):
    for a, b in combinations(graph["nodes"], 2):
        assert not overlap(box(a), box(b)), (a["id"], a["type"], b["id"], b["type"])
    for a, b in combinations(graph["groups"], 2):
        assert not overlap(group_box(a), group_box(b)), (a["title"], b["title"])


def test_every_node_lies_in_one_titled_group(graph):
    assert all(group["title"].strip() for group in graph["groups"])
    for node in graph["nodes"]:
        containing = [group["title"] for group in graph["groups"] if inside(box(node), group_box(group))]
        touched = [group["title"] for group in graph["groups"] if overlap(box(node), group_box(group))]
        assert containing == touched and len(containing) == (node["type"] != NOTE), (node["id"], node["type"], touched)


def test_the_note_names_every_file(workflow):
    """The note names embedded models in bold, and for every other file the folder it goes into."""
    note = note_of(workflow)
    inside = [node for subgraph in subgraphs_of(workflow).values() for node in subgraph["nodes"]]
    loaders = [node for node in (*workflow["nodes"], *inside) if "Load" in node["type"] and node["type"] not in ("LoadVideo", "LoadImage")]
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


@pytest.mark.parametrize("path", [*FILES, *BLUEPRINTS], ids=lambda path: path.stem)
def test_subgraphs_are_connected(path):
    """A subgraph's inputs and outputs are those of the nodes that hold it, and lead to slots of the nodes inside, of the same types."""
    workflow = read(path)
    subgraphs = subgraphs_of(workflow)
    holders = [node for node in workflow["nodes"] if "-" in node["type"]]
    assert {node["type"] for node in holders} == subgraphs.keys()
    for subgraph in subgraphs.values():
        nodes, links = {node["id"]: node for node in subgraph["nodes"]}, {link["id"]: link for link in subgraph["links"]}
        assert subgraph["state"]["lastNodeId"] == max(nodes) and subgraph["state"]["lastLinkId"] == max(links)
        for index, slot in enumerate(subgraph["inputs"]):
            ends = [links[number] for number in slot["linkIds"]]
            assert ends and all((link["origin_id"], link["origin_slot"], link["type"]) == (SUBGRAPH_INPUTS, index, slot["type"]) for link in ends)
            entries = [nodes[link["target_id"]]["inputs"][link["target_slot"]] for link in ends]
            assert all(entry["link"] == link["id"] and entry["type"] == slot["type"] for entry, link in zip(entries, ends))
        for index, slot in enumerate(subgraph["outputs"]):
            (link,) = (links[number] for number in slot["linkIds"])
            assert (link["target_id"], link["target_slot"], link["type"]) == (SUBGRAPH_OUTPUTS, index, slot["type"])
            output = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert output["type"] == slot["type"] and link["id"] in output["links"]
    for node in holders:
        subgraph = subgraphs[node["type"]]
        for side in ("inputs", "outputs"):
            assert [(slot["name"], slot["type"]) for slot in node[side]] == [(slot["name"], slot["type"]) for slot in subgraph[side]]
        inner = {str(other["id"]): other for other in subgraph["nodes"]}
        shown = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        assert len(node["properties"]["proxyWidgets"]) == len(shown) and node["widgets_values"] == []
        for number, name in node["properties"]["proxyWidgets"]:
            assert name in {slot["widget"]["name"] for slot in inner[number]["inputs"] if "widget" in slot and slot["link"]}


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_node_that_says_what_it_is(path):
    workflow = read(path)
    (node,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["title"] == subgraph["name"] == path.stem and workflow["links"] == []
    assert subgraph["category"] == "Video generation and editing/Video Edit" and subgraph["description"] == workflow["extra"]["BlueprintDescription"]
    assert path.stem.lower().startswith("video edit") and len(path.stem) < len("Video Edit (Bernini-R)")  # the node search puts shorter names first


def test_the_blueprint_starts_with_the_embedded_models_and_names_the_large_ones():
    (subgraph,) = subgraphs_of(read(ROOT / "subgraphs" / "Video Edit (MiVE).json")).values()
    files = {node["type"]: node["widgets_values"][0] for node in subgraph["nodes"] if "Load" in node["type"]}
    assert files == {"MiVELoadDiT": "tiny/dit.safetensors", "MiVELoadVLM": "tiny/vlm", "VAELoader": "tiny/vae.safetensors"}
    note = note_of(subgraph)
    assert all(f"**{name}**" in note for name in files.values())
    for name in ("models/diffusion_models", "models/text_encoders", "models/vae", "Qwen3-VL-8B-Instruct", "wan_2.1_vae.safetensors", "None is published"):
        assert name in note, name


def test_the_quickstart_holds_the_blueprints():
    """Inside are the blueprints as they are placed, but for the instruction."""
    quickstart = subgraphs_of(read(FILES[0]))
    for path in BLUEPRINTS:
        (blueprint,) = subgraphs_of(read(path)).values()
        held = json.loads(json.dumps(quickstart.pop(blueprint["id"])))
        for node in held["nodes"]:
            if node["type"] == "MiVEEditVideo":
                assert node["widgets_values"][0]
                node["widgets_values"][0] = ""
        assert held == blueprint
    assert not quickstart


def test_the_quickstart_is_small_and_has_an_app():
    """Nodes and widgets of app mode exist; what it shows is what is saved. The samples are put into the input folder by the pack."""
    workflow = read(FILES[0])
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) <= 10
    app = workflow["extra"]["linearData"]
    assert [nodes[number]["type"] for number in app["outputs"]] == ["SaveVideo"]
    named = {(node["type"], "file" if node["type"] == "LoadVideo" else "image") for node in nodes.values() if node["type"] in ("LoadVideo", "LoadImage")}
    for number, name in app["inputs"]:
        assert name in {slot["name"] for slot in nodes[number]["inputs"] if "widget" in slot} or (nodes[number]["type"], name) in named
    source = (ROOT / "nodes" / "bridge" / "paths.py").read_text(encoding="utf-8")
    assert all(f'"{node["widgets_values"][0]}"' in source for node in nodes.values() if (node["type"], "file") in named or (node["type"], "image") in named)
