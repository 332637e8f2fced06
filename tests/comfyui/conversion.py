"""A workflow as the browser saves it -> the prompt that it queues."""

NOTES = ("MarkdownNote", "Note")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
CONTROLS = ("fixed", "increment", "decrement", "randomize")
SUBGRAPH_INPUTS = -10  # the node that stands for them inside a subgraph


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """Widgets are matched to a node's inputs in their order, as the browser does. Raises where a node is unknown.

    The nodes of a subgraph stand in its place; their numbers follow that of the node that holds them, as in 6:11.
    """
    subgraphs = {subgraph["id"]: subgraph for subgraph in workflow.get("definitions", {}).get("subgraphs", ())}
    prompt: dict = {}

    def add(graph: dict, prefix: str = "", given: list | None = None) -> list:
        """Adds a graph's nodes. given: what its inputs are connected to, None where the widget's own value counts. Returns the same of its outputs."""
        ends = dict(origin(link) for link in graph["links"])
        holders = {node["id"]: node for node in graph["nodes"] if node["type"] in subgraphs}
        inside: dict[int, list] = {}

        def source(link: int | None):
            if link is None:
                return None
            number, slot = ends[link]
            if number == SUBGRAPH_INPUTS:
                return given[slot]
            return hold(holders[number])[slot] if number in holders else [f"{prefix}{number}", slot]

        def hold(node: dict) -> list:
            if node["id"] not in inside:
                assert not node["widgets_values"], "the values are those of the widgets inside"
                inside[node["id"]] = add(subgraphs[node["type"]], f"{prefix}{node['id']}:", [source(slot["link"]) for slot in node["inputs"]])
            return inside[node["id"]]

        for node in graph["nodes"]:
            if node["id"] in holders:
                hold(node)
            elif node["type"] not in NOTES:
                inputs: dict = {}
                read_widgets(object_info[node["type"]]["input"], list(node["widgets_values"]), inputs)
                inputs |= {slot["name"]: found for slot in node["inputs"] if (found := source(slot["link"])) is not None}
                prompt[f"{prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
        return [source(slot["linkIds"][0]) for slot in graph.get("outputs", ())]

    add(workflow)
    return prompt


def origin(link: list | dict) -> tuple[int, tuple[int, int]]:
    """A workflow's or a subgraph's link -> its number, and the node and slot that it comes from."""
    return (link["id"], (link["origin_id"], link["origin_slot"])) if isinstance(link, dict) else (link[0], (link[1], link[2]))


def read_widgets(declared: dict, values: list, inputs: dict, prefix: str = "") -> None:
    """Moves the values of widgets into `inputs`. The inputs that a choice brings with it, as SaveVideo's since ComfyUI 0.34, follow it as `choice.name`."""
    for name, (kind, *options) in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        if options and options[0].get("hidden"):
            continue
        if isinstance(kind, list) or kind in WIDGETS:
            inputs[prefix + name] = values.pop(0)
            if options and options[0].get("control_after_generate"):
                assert values.pop(0) in CONTROLS
        if kind == DYNAMIC:
            (chosen,) = (option for option in options[0]["options"] if option["key"] == inputs[prefix + name])
            read_widgets(chosen["inputs"], values, inputs, f"{prefix}{name}.")
