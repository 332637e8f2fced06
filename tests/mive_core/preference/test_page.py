import base64
import json
import re

import av
import pytest
import torch
from preference_study import CLIPS, SYSTEMS

from mive_core.data.manifest import read_manifest
from mive_core.errors import UserError
from mive_core.media.video import read_clip, write_video
from mive_core.preference.page import PageOptions, make_page, shown_size
from mive_core.preference.systems import read_systems
from mive_core.types import Clip


def scripts(page) -> dict[str, str]:
    """The page's data elements by id."""
    return dict(re.findall(r'<script type="[\w/]+" id="([\w-]+)"[^>]*>(.*?)</script>', page.read_text(encoding="utf-8")))


def test_the_page_is_blind(page, key):
    text = page.read_text(encoding="utf-8")
    decoded = b"".join(base64.b64decode(content) for name, content in scripts(page).items() if name != "page")
    for system in SYSTEMS:
        assert system in json.dumps(key)
        assert system not in text and system.encode() not in decoded
    assert not re.search(r"https?://|<link|src=", text)


def test_the_key_says_which_edit_is_whose(page, study, key, tmp_path):
    """Each edit is found again in the page by its pixels."""
    data = scripts(page)
    for token, video in key["videos"].items():
        index = CLIPS.index(key["clips"][video["clip"]]["name"])
        (tmp_path / "video.mp4").write_bytes(base64.b64decode(data[f"m-{token}"]))
        shown = read_clip(tmp_path / "video.mp4").frames
        errors = {system: (shown - read_clip(next((study / system).glob(f"{index:06d}*"))).frames).abs().mean().item() for system in SYSTEMS}
        assert errors[video["system"]] < 0.05 < 0.1 < max(errors.values())


def test_what_the_page_holds(page, key):
    data = scripts(page)
    shown = json.loads(data["page"])
    assert shown["page"] == key["page"] and shown["scores"] is True
    assert len(shown["comparisons"]) == len(key["comparisons"]) == 3
    assert all({name: pair[name] for name in ("clip", "first", "second")} == key["comparisons"][pair["id"]] for pair in shown["comparisons"])
    assert [clip["instruction"] for clip in shown["clips"].values()] == [f"</script> make {name} red & blue" for name in CLIPS]
    assert len(data) == 1 + 3 * (2 + len(SYSTEMS))


def test_browsers_play_the_videos(page, key, tmp_path):
    for token in key["videos"]:
        (tmp_path / "video.mp4").write_bytes(base64.b64decode(scripts(page)[f"m-{token}"]))
        with av.open(str(tmp_path / "video.mp4")) as container:
            (stream,) = container.streams
            assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 48, 32)


def test_a_smaller_edit_is_shown_at_the_sources_size(study, tmp_path):
    entries = read_manifest(study / "pairs.jsonl")[:1]
    for name, size in (("small", (16, 24)), ("tall", (48, 16))):
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "a cat.mp4", Clip(torch.rand(5, *size, 3), 8.0))
    page, key = make_page(entries, read_systems([(name, str(tmp_path / name)) for name in ("small", "tall")], entries), tmp_path / "page.html")
    sizes = {}
    for token, video in json.loads(key.read_text(encoding="utf-8"))["videos"].items():
        (tmp_path / "video.mp4").write_bytes(base64.b64decode(scripts(page)[f"m-{token}"]))
        sizes[video["system"]] = tuple(read_clip(tmp_path / "video.mp4").frames.shape[1:3])
    assert sizes == {"small": (32, 48), "tall": (48, 16)}


def test_the_size_is_told_first_and_limited(study, tmp_path):
    entries = read_manifest(study / "pairs.jsonl")
    systems = read_systems([(name, str(study / name)) for name in SYSTEMS], entries)
    lines = []

    def report(line):
        assert not list(tmp_path.iterdir())
        lines.append(line)

    page, _ = make_page(entries, systems, tmp_path / "page.html", report=report)
    assert lines == [f"3 clips, 2 systems, 3 pairs to compare: a page of {page.stat().st_size / 1e6:.3g} MB"]
    size = page.stat().st_size
    for limit, num_done in ((size // 4, 1), (size // 2, 2)):  # foreseen by the first clip, or exceeded by the second
        with pytest.raises(
            UserError, match=rf"too large for a browser; got about 0\.[0-9]+ MB by {num_done} of 3 clips; expected .* MB at most; make the videos"
        ):
            make_page(entries, systems, tmp_path / "other.html", PageOptions(max_bytes=limit))
    assert not (tmp_path / "other.html").exists() and not (tmp_path / "other.key.json").exists()


def test_an_earlier_page_and_its_key_stay(study, page):
    entries = read_manifest(study / "pairs.jsonl")
    systems = read_systems([(name, str(study / name)) for name in SYSTEMS], entries)
    before = page.read_bytes(), page.with_name("page.key.json").read_bytes()
    with pytest.raises(UserError, match="votes on an earlier page need its key"):
        make_page(entries, systems, page)
    assert before == (page.read_bytes(), page.with_name("page.key.json").read_bytes())


@pytest.mark.parametrize("size, shown", [((1920, 1080), (854, 480)), ((97, 33), (96, 32)), ((640, 480), (640, 480)), ((1, 1), (2, 2))])
def test_shown_size(size, shown):
    assert shown_size(size, 480) == shown
