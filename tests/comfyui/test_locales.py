"""The languages against the schemas that ComfyUI has loaded: what the English texts say, the others say, and the server hands them out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
NUMBER = re.compile(r"\d[\d.]*\d|\d")
FILE = re.compile(r"[\w./]*(?:\w/\w|\w\.(?:safetensors|json|mp4|txt))[\w./]*", re.ASCII)  # paths and file names: models/loras, tiny/vlm, config.json


def english_texts(pack) -> dict[str, str]:
    """Every text that a node's schema shows, by its path in nodeDefs.json."""
    found = {}
    for name in json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8")):
        schema = pack.node(name).define_schema()
        found |= {f"{name}.display_name": schema.display_name, f"{name}.description": schema.description}
        for item in schema.inputs:
            found |= {f"{name}.inputs.{item.id}.name": item.id, f"{name}.inputs.{item.id}.tooltip": item.tooltip}
        for index, item in enumerate(schema.outputs):
            found |= {f"{name}.outputs.{index}.name": item.display_name, f"{name}.outputs.{index}.tooltip": item.tooltip}
    return {path: text for path, text in found.items() if text}


def texts(value: dict | str, path: str = "") -> dict[str, str]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: text for name, part in value.items() for key, text in texts(part, f"{path}.{name}".lstrip(".")).items()}


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return request.param


def test_every_english_text_is_translated_and_nothing_else(pack, language):
    english, found = english_texts(pack), texts(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))
    different = english.keys() ^ found.keys()
    assert not different, sorted(different)
    english_still = [path for path, text in found.items() if text == english[path] and path.endswith(("tooltip", "description", "display_name"))]
    assert not english_still, english_still


def test_numbers_and_file_names_are_kept(pack, language):
    english, found = english_texts(pack), texts(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))
    for path in sorted(english.keys() & found.keys()):
        for kept in (NUMBER, FILE):
            missing = Counter(text.rstrip(".") for text in kept.findall(english[path])) - Counter(text.rstrip(".") for text in kept.findall(found[path]))
            assert not missing, (path, missing)


def test_options_are_quoted_as_they_are(pack, language):
    """Options are not translated: a tooltip that explains one in English names it in the other language, too."""
    found = texts(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))
    for name in json.loads((Path(__file__).parent / "schemas.json").read_text(encoding="utf-8")):
        for item in pack.node(name).define_schema().inputs:
            explained = [option for option in getattr(item, "options", None) or [] if f"{option}: " in item.tooltip]
            assert [option for option in explained if option not in found[f"{name}.inputs.{item.id}.tooltip"]] == [], (name, item.id)


def test_the_server_hands_out_each_language(pack, base):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    before = folder_paths.folder_names_and_paths["custom_nodes"]
    folder_paths.folder_names_and_paths["custom_nodes"] = ([str(base / "custom_nodes")], set())
    try:
        served = CustomNodeManager().build_translations()
    finally:
        folder_paths.folder_names_and_paths["custom_nodes"] = before
    assert sorted(served) == LANGUAGES
    for language in LANGUAGES:
        files = {name: json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8")) for name in ("main", "nodeDefs")}
        assert served[language] == {**files["main"], "nodeDefs": files["nodeDefs"]}
