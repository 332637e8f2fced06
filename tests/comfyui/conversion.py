"""A workflow as the browser saves it -> the prompt that it queues."""

NOTES = ("MarkdownNote", "Note")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
CONTROLS = ("fixed", "increment", "decrement", "randomize")


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """Widgets are matched to a node's inputs in their order, as the browser does. Raises where a node is unknown."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        values, inputs = list(node["widgets_values"]), {}
        read_widgets(info["input"], values, inputs)
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


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
