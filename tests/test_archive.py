"""The archive for the ComfyUI registry is complete and described."""

import ast
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import yaml
from archive import FILES, ROOT, SOURCES

import mive_core

MAX_BYTES = 36e6
NO_ADDRESS = "https://no-public-address-yet.invalid/mive"  # a name that can never be reached, RFC 2606
KINDS = {
    ".js",
    "",
    ".jinja",
    ".jpg",
    ".json",
    ".md",
    ".mp4",
    ".png",
    ".py",
    ".safetensors",
    ".svg",
    ".toml",
    ".txt",
    ".webp",
    ".yaml",
}  # no built or packed code
LINK = re.compile(r"\]\(([^)\s]+)\)")
HELP = ROOT / "web" / "docs"
PAGES = [path for path in FILES if path.suffix == ".md"]


def imported(path: Path) -> set[Path]:
    """Returns the files that a file imports by relative imports, at its top or in a function, with the __init__.py of their folders."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            targets = [base, *(base / alias.name for alias in node.names)]
            found |= {file for target in targets for file in (target.with_suffix(".py"), target / "__init__.py") if file.is_file()}
    return found | {folder / "__init__.py" for file in found for folder in file.parents if ROOT in folder.parents and (folder / "__init__.py").is_file()}


def test_the_code_is_what_the_pack_reaches():
    """Each module that the pack's entry reaches is in the archive, and no other. What only the command line needs goes into .comfyignore."""
    reached: set[Path] = set()
    waiting = {ROOT / "__init__.py"}
    while waiting:
        reached |= waiting
        waiting = {file for path in waiting for file in imported(path)} - reached
    assert {"nodes/sampling.py", "mive_core/train/loop.py"} < {path.relative_to(ROOT).as_posix() for path in reached}
    assert sorted(map(str, reached ^ set(SOURCES))) == []


def problems_of_links(page: Path, text: str, files: list[Path]) -> list[str]:
    """Returns the links of a page that lead to no file among `files`, or to no heading of the file.

    ComfyUI reads the pictures of a help page from web/docs, also those of a translation, which lies in a folder below it.
    """
    found = []
    folder = HELP if HELP in page.parents else page.parent
    for target in LINK.findall(text):
        address = urlsplit(target)
        if address.scheme:
            continue
        path = (folder / unquote(address.path)).resolve() if address.path else page
        if path not in files and not any(path in file.parents for file in files):
            found.append(f"{target}: not in the archive")
        elif address.fragment and address.fragment not in headings(text if path == page else path.read_text(encoding="utf-8")):
            found.append(f"{target}: no such heading")
    return found


def headings(text: str) -> set[str]:
    """Returns the anchors that a Markdown page's headings get on code hosts."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_into_the_archive(page):
    assert problems_of_links(page, page.read_text(encoding="utf-8"), FILES) == []


@pytest.mark.parametrize(
    "page, link, says",
    [
        ("README.md", "[a](docs/comfyui.md#install)", []),
        ("README.md", "[a](results/screens)", []),
        ("README.md", "![a](results/embedded/demo.png)", []),
        ("README.md", "[a](https://example.com/tests/)", []),
        ("README.md", "## A `title`, here\n[a](#a-title-here)", []),
        ("README.md", "[a](tests/test_archive.py)", ["tests/test_archive.py: not in the archive"]),
        ("README.md", "[a](docs/gone.md)", ["docs/gone.md: not in the archive"]),
        ("README.md", "[a](docs/comfyui.md#gone)", ["docs/comfyui.md#gone: no such heading"]),
        ("README.md", "[a](../outside.md)", ["../outside.md: not in the archive"]),
        ("README.md", "```\n# code\n```\n[a](#code)", ["#code: no such heading"]),
        ("web/docs/MiVESampler/zh.md", "![a](images/MiVESampler.webp)", []),
        ("web/docs/MiVESampler/zh.md", "![a](../images/MiVESampler.webp)", ["../images/MiVESampler.webp: not in the archive"]),
        ("web/docs/MiVESampler/zh.md", "![a](images/gone.webp)", ["images/gone.webp: not in the archive"]),
    ],
)
def test_wrong_links_are_found(page, link, says):
    assert problems_of_links(ROOT / page, link, FILES) == says


def test_every_line_of_comfyignore_leaves_something_out_or_keeps_it():
    """A line whose files were renamed would let them into the archive unseen."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.splitlines()
    for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines():
        pattern = line.lstrip("!/").rstrip("*")
        assert line.startswith("#") or any(name == pattern or (name.startswith(pattern) and pattern.endswith("/")) for name in tracked), line


def test_assets_say_where_they_come_from():
    """Each file that is no text is named on a page of its folder or of one above it. There is no code of others, and none that is built or packed."""
    assert {path.suffix for path in FILES} <= KINDS
    assert not [path for path in FILES if {"vendor", "third_party", "dist", "build", "node_modules"} & set(path.relative_to(ROOT).parts)]
    assets = ROOT / "mive_core" / "assets"
    for path in FILES:
        if assets in path.parents and path.suffix in (".mp4", ".png", ".safetensors"):
            pages = [folder / "README.md" for folder in path.parents if folder != assets and assets in folder.parents and (folder / "README.md") in FILES]
            names = {path.name, *(folder.name + "/" for folder in path.parents)}
            assert any(f"`{name}" in page.read_text(encoding="utf-8") for page in pages for name in names), path


def test_contains_what_comfyui_needs_and_no_more():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert names >= {
        "__init__.py",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements.txt",
        "web/docs/MiVESampler.md",
        "web/js/node_text.js",
        "subgraphs/Video Edit (MiVE).json",
        "subgraphs/Video Edit Frame MiVE.json",
        "workflows/MiVE 1 Edit a Video.json",
        "workflows/MiVE 1 Edit a Video.jpg",
        "mive_core/assets/tiny/dit.safetensors",
        "mive_core/assets/samples/bigbuckbunny_33f.mp4",
        "mive_core/assets/samples/bigbuckbunny_grass.mp4",
    }
    translated = {path.relative_to(ROOT).as_posix() for folder in ("locales", "web/docs") for path in (ROOT / folder).rglob("*.*")}
    assert {"locales/zh/nodeDefs.json", "locales/zh/main.json", "web/docs/MiVESampler/zh.md"} <= translated <= names
    left_out = (
        "tests/",
        ".",
        "Makefile",
        "mive_core/embedded/",
        "mive_core/bench/",
        "mive_core/commands/",
        "mive_core/parsers/",
        "mive_core/cli.py",
        "mive_core/__main__.py",
    )
    assert not [name for name in names if name.startswith(left_out)]
    assert "mive_core/train/loop.py" in names  # the trainer, which MiVE Train LoRA runs
    assert sum(path.stat().st_size for path in FILES) < MAX_BYTES


@pytest.fixture
def described() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_is_described_for_the_registry(described):
    project, comfy = described["project"], described["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*", project["name"]) and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["license"] == "Apache-2.0" and project["classifiers"] == ["Operating System :: OS Independent"]
    assert project["version"] == mive_core.__version__  # what `mive --version` prints
    assert comfy["PublisherId"] and comfy["DisplayName"] and re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert comfy["includes"] == []  # archive.py knows .comfyignore alone
    assert problems_of_addresses(project["urls"]["Repository"], comfy["Icon"], comfy["Banner"]) == []


def problems_of_addresses(repository: str, icon: str, banner: str) -> list[str]:
    """Returns which addresses are neither the placeholder nor one on the web, or are of another repository than the others."""
    found = [f"{address}: no https" for address in (repository, icon, banner) if urlsplit(address).scheme != "https" or not urlsplit(address).hostname]
    if repository == NO_ADDRESS:
        found += [f"{address}: no placeholder" for address in (icon, banner) if not address.startswith(f"{NO_ADDRESS}/")]
    else:
        found += [f"{address}: still a placeholder" for address in (repository, icon, banner) if (urlsplit(address).hostname or "").endswith(".invalid")]
    ends = {icon: "/web/icon.svg", banner: "/web/banner.svg"}
    return found + [f"{address}: not {end}" for address, end in ends.items() if not urlsplit(address).path.endswith(end)]


REAL = "https://github.com/someone/mive"
RAW = "https://raw.githubusercontent.com/someone/mive/main/web"


@pytest.mark.parametrize(
    "addresses, says",
    [
        ((REAL, f"{RAW}/icon.svg", f"{RAW}/banner.svg"), []),
        (("", f"{RAW}/icon.svg", f"{RAW}/banner.svg"), ["no https"]),
        (("http://github.com/someone/mive", f"{RAW}/icon.svg", f"{RAW}/banner.svg"), ["no https"]),
        (("https://", f"{RAW}/icon.svg", f"{RAW}/banner.svg"), ["no https"]),
        (("https://example.invalid/mive", f"{RAW}/icon.svg", f"{RAW}/banner.svg"), ["still a placeholder"]),
        ((REAL, f"{NO_ADDRESS}/web/icon.svg", f"{RAW}/banner.svg"), ["still a placeholder"]),
        ((NO_ADDRESS, f"{NO_ADDRESS}/web/icon.svg", f"{RAW}/banner.svg"), ["no placeholder"]),
        ((REAL, f"{RAW}/icon.png", f"{RAW}/banner.svg"), ["not /web/icon.svg"]),
        ((REAL, "web/icon.svg", f"{RAW}/banner.svg"), ["no https", "not /web/icon.svg"]),
    ],
)
def test_bad_addresses_are_named(addresses, says):
    found = problems_of_addresses(*addresses)
    assert [problem.rpartition(": ")[2] for problem in found] == says


@pytest.mark.skipif(shutil.which("bash") is None, reason="the workflow's steps are bash")
def test_nothing_is_published_under_the_placeholder(tmp_path):
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))["jobs"]["publish"]["steps"]
    (check,) = (step["run"] for step in steps if "run" in step)
    assert steps.index(next(step for step in steps if "run" in step)) < steps.index(next(step for step in steps if "publish" in step.get("uses", "")))
    for address, code in ((NO_ADDRESS, 1), (REAL, 0)):
        (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
        assert subprocess.run(["bash", "-e", "-c", check], cwd=tmp_path, capture_output=True).returncode == code


@pytest.mark.parametrize("name, width, height", [("icon", 400, 400), ("banner", 1680, 720)])
def test_pictures_have_the_registrys_sizes(name, width, height):
    """The icon is square and at most 400 pixels wide, the banner 21:9. Nothing in them is fetched or run."""
    picture = ElementTree.parse(ROOT / "web" / f"{name}.svg").getroot()
    assert (picture.get("width"), picture.get("height"), picture.get("viewBox")) == (str(width), str(height), f"0 0 {width} {height}")
    assert (width <= 400 and width == height) or width * 9 == height * 21
    for element in picture.iter():
        assert element.tag.rpartition("}")[2] not in ("script", "image", "use", "foreignObject", "style")
        assert not [key for key in element.keys() if "href" in key or key.startswith("on")]


def test_requirements_leave_torch_alone_and_cap_nothing():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert lines and all(re.fullmatch(r"[a-z0-9-]+>=[\d.]+", line) and not line.startswith("torch") for line in lines), lines
