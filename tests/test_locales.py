"""The languages of nodes and help pages: complete, and made of the same parts as the English. Needs no ComfyUI.

A language is a folder of locales/. What its texts say of the English ones is compared in tests/comfyui/test_locales.py.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
SCHEMAS = json.loads((ROOT / "tests" / "comfyui" / "schemas.json").read_text(encoding="utf-8"))
HAN, KANA, HANGUL = "[\u4e00-\u9fff]", "[\u3040-\u30ff]", "[\uac00-\ud7a3]"
LETTERS = {"zh": HAN, "ja": f"{HAN}|{KANA}", "ko": HANGUL}  # a language that is added states its own here
MESSAGE_SYNTAX = re.compile(r"[{}@|]")  # vue-i18n reads these as placeholders, links and plurals
ENGLISH = re.compile(r"\b[a-z]+(?: [a-z]+){3,}")  # four words in a row
CODE = re.compile(r"`[^`]+`")
IMAGE = re.compile(r"!\[(.*?)\]\((.*?)\)")
NUMBER = re.compile(r"\d[\d.]*\d|\d")


@cache
def read(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def texts(value: dict | str, path: str = "") -> dict[str, str]:
    """The leaves of nested dictionaries by their path: MiVESampler.inputs.steps.name."""
    if not isinstance(value, dict):
        return {path: value}
    return {key: text for name, part in value.items() for key, text in texts(part, f"{path}.{name}".lstrip(".")).items()}


def expected_paths() -> set[str]:
    """What each node needs: a display name, a description, a name for every input and output, a tooltip for every input."""
    paths = set()
    for node, schema in SCHEMAS.items():
        paths |= {f"{node}.display_name", f"{node}.description"}
        paths |= {f"{node}.inputs.{entry[0]}.{part}" for entry in schema["inputs"] for part in ("name", "tooltip")}
        paths |= {f"{node}.outputs.{index}.name" for index in range(len(schema["outputs"]))}
    return paths


def optional_paths() -> set[str]:
    return {f"{node}.outputs.{index}.tooltip" for node, schema in SCHEMAS.items() for index in range(len(schema["outputs"]))}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def blocks_of(page: Path) -> list[str]:
    return re.split(r"\n\s*\n", page.read_text(encoding="utf-8").strip())


def outline(page: Path) -> list[tuple[str, int]]:
    """The page's blocks in order: levels of headings, rows of tables, pictures, and paragraphs."""
    blocks = []
    for block in blocks_of(page):
        heading = re.match("#+", block)
        if heading:
            blocks.append(("heading", len(heading[0])))
        elif block.startswith("|"):
            blocks.append(("table", block.count("\n") + 1))
        else:
            blocks.append(("picture" if IMAGE.match(block) else "paragraph", 1))
    return blocks


def rows(page: Path) -> list[list[str]]:
    return [cells(line) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


@pytest.fixture(params=LANGUAGES)
def language(request) -> str:
    return request.param


@pytest.fixture(params=SCHEMAS)
def node(request) -> str:
    return request.param


def test_every_language_is_one_that_the_frontend_knows(language):
    assert language in LETTERS
    assert {path.name for path in (LOCALES / language).iterdir()} == {"main.json", "nodeDefs.json"}


def test_every_text_is_there_and_none_is_left_over(language):
    found = set(texts(read(language, "nodeDefs")))
    missing, left_over = expected_paths() - found, found - expected_paths() - optional_paths()
    assert not missing, sorted(missing)
    assert not left_over, sorted(left_over)


def test_texts_are_in_the_language(language):
    for path, text in texts(read(language, "nodeDefs")).items():
        if path.endswith((".tooltip", ".description")):
            assert re.search(LETTERS[language], text), path
            assert not ENGLISH.search(text), path
        else:
            assert text and not MESSAGE_SYNTAX.search(text), path
            assert not ENGLISH.search(text), path
        assert text == text.strip(), path
        if path.endswith(".description"):
            assert not MESSAGE_SYNTAX.search(text), path


def test_nodes_have_names_of_their_own(language):
    """Each name says whose node it is; two inputs of one node never have the same name."""
    names = {node: entry["display_name"] for node, entry in read(language, "nodeDefs").items()}
    assert all("MiVE" in name for name in names.values()), names
    assert len(set(names.values())) == len(names)
    for node, entry in read(language, "nodeDefs").items():
        for part in ("inputs", "outputs"):
            found = [item["name"] for item in entry[part].values()]
            assert len(set(found)) == len(found), (node, part, found)


def test_main_holds_what_the_frontend_reads(language):
    """The heading of the pack's templates, under the two names that the pack's folder can have."""
    assert set(texts(read(language, "main"))) == {f"templateWorkflows.category.{folder}" for folder in ("MiVE", "mive")}
    assert all("MiVE" in text and re.search(LETTERS[language], text) for text in texts(read(language, "main")).values())


def test_help_page_is_the_english_one_in_other_words(language, node):
    """The same blocks, pictures, inputs, outputs, messages and code. Messages stay English, as the program gives them, with a translation."""
    english, page = DOCS / f"{node}.md", DOCS / node / f"{language}.md"
    assert page.exists(), page
    text, original = page.read_text(encoding="utf-8"), english.read_text(encoding="utf-8")
    assert [name for _, name in IMAGE.findall(text)] == [name for _, name in IMAGE.findall(original)]  # both are read from web/docs
    missing = set(CODE.findall(original)) - set(CODE.findall(text))
    assert not missing, sorted(missing)
    assert outline(page) == outline(english)
    for ours, theirs in zip(blocks_of(page), blocks_of(english), strict=True):
        for ours_line, their_line in zip(ours.splitlines(), theirs.splitlines(), strict=ours.startswith("|")):
            if ours.startswith("|"):
                assert Counter(NUMBER.findall(their_line)) <= Counter(NUMBER.findall(ours_line)), ours_line
        assert Counter(NUMBER.findall(theirs)) <= Counter(NUMBER.findall(ours)), ours
    entry = read(language, "nodeDefs")[node]
    names = {"inputs": {key: item["name"] for key, item in entry["inputs"].items()}, "outputs": [item["name"] for item in entry["outputs"].values()]}
    kind, output = "", 0
    for ours, theirs in zip(rows(page), rows(english), strict=True):
        assert len(ours) == len(theirs), ours
        if theirs[0] in ("input", "output", "message", "file"):
            kind = theirs[0]
            continue
        if kind == "input":
            ids = re.findall("`([^`]+)`", theirs[0])
            assert re.findall("`([^`]+)`", ours[0]) == ids
            assert all(names["inputs"][name] in ours[0] for name in ids), (ours[0], [names["inputs"][name] for name in ids])
        elif kind == "output" and theirs[0].startswith("`"):
            assert ours[0].startswith(theirs[0]) and names["outputs"][output] in ours[0], (ours[0], names["outputs"][output])
            output += 1
        elif kind == "message" and not theirs[0].startswith("-"):
            assert ours[0].startswith(theirs[0]) and re.search(LETTERS[language], ours[0].removeprefix(theirs[0])), ours[0]


def test_help_page_is_in_the_language(language, node):
    page = DOCS / node / f"{language}.md"
    title, *lines = page.read_text(encoding="utf-8").splitlines()
    english = (DOCS / f"{node}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert title == f"# {read(language, 'nodeDefs')[node]['display_name']} ({english})"
    for line in lines:
        if line and not line.startswith("|"):
            assert re.search(LETTERS[language], line), line
        if line.startswith("|") and not line.startswith("|-"):
            *_, last = cells(line)
            assert re.search(LETTERS[language], last), line
        words = CODE.sub("", " ".join(cells(line)[1:]) if line.startswith("|") else line)
        assert not ENGLISH.search(words), line


def test_nodes_are_called_by_their_translated_names(language, node):
    """Elsewhere than in titles and messages: what the reader is told to look for is what the screen shows."""
    english = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in sorted(DOCS.glob("*.md"))]
    kept = {entry["display_name"] for entry in read(language, "nodeDefs").values()}
    lines = (DOCS / node / f"{language}.md").read_text(encoding="utf-8").splitlines()[1:]
    found = [" ".join(cells(line)[1:]) if line.startswith("|") else line for line in lines]
    found += [text for path, text in texts(read(language, "nodeDefs")[node]).items() if not path.endswith("display_name")]
    assert [(name, text) for name in english for text in found if name in text and name not in kept] == []
