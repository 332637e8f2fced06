"""The files of the help pages: one small picture per page. Needs no ComfyUI; how the pages look is checked in the browser."""

import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "web" / "docs"
PAGES = sorted(DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_page_has_one_picture(page):
    ((alt, name),) = re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8"))
    assert alt and name == f"images/{page.stem}.webp"
    with Image.open(DOCS / name) as picture:
        assert picture.format == "WEBP" and picture.width >= 300


def test_pictures_are_small_and_used():
    pictures = sorted((DOCS / "images").iterdir())
    assert {path.stem for path in pictures} == {page.stem for page in PAGES}
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) < 25_000 and sum(sizes) < 200_000
