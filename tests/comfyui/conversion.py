"""A workflow as the browser saves it -> the prompt that it queues."""

NOTES = ("MarkdownNote", "Note")
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
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for name, (kind, *options) in declared.items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[name] = values.pop(0)
                if options and options[0].get("control_after_generate"):
                    assert values.pop(0) in CONTROLS
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
