"""Manifests and media behind URLs, with fsspec's file system in memory."""

import sys

import pytest
import torch

from mive_core.data.manifest import load_entry, read_manifest, write_manifest
from mive_core.errors import UserError
from mive_core.media.images import write_frames, write_image
from mive_core.media.remote import local_copy
from mive_core.media.video import write_video
from mive_core.types import Clip

fsspec = pytest.importorskip("fsspec")
LINE = '{"source": "clips/a.mp4", "reference": "first.png", "target": "frames", "instruction": "make it night"}\n'


@pytest.fixture
def store(tmp_path, monkeypatch):
    """memory://set with a manifest, a video, an image and a folder of frames; copies go to a folder of the test."""
    frames = torch.rand(5, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "a.mp4", Clip(frames, 8.0))
    write_image(tmp_path / "first.png", frames[0])
    write_frames(tmp_path / "frames", frames)
    monkeypatch.setenv("MIVE_CACHE", str(tmp_path / "copies"))
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path / "a.mp4"), "/set/clips/a.mp4")
    files.put(str(tmp_path / "first.png"), "/set/first.png")
    files.put(str(tmp_path / "frames"), "/set/frames", recursive=True)
    files.pipe("/set/pairs.jsonl", LINE.encode())
    yield files
    files.rm("/set", recursive=True)


def test_a_pair_behind_urls_is_read(store, tmp_path):
    (entry,) = read_manifest("memory://set/pairs.jsonl")
    assert entry.source == "memory://set/clips/a.mp4" and entry.target == "memory://set/frames"
    pair = load_entry(entry)
    assert pair.target.shape == pair.request.source.frames.shape == (5, 32, 48, 3) and pair.request.source.fps == 8
    copies = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()}
    assert len(copies) == 3
    load_entry(entry)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "copies").iterdir()} == copies


def test_a_local_manifest_may_name_urls(store, tmp_path):
    entries = read_manifest("memory://set/pairs.jsonl")
    assert read_manifest(write_manifest(tmp_path / "kept.jsonl", entries)) == entries


def test_another_content_is_another_copy(store):
    before = local_copy("memory://set/first.png", "image")
    store.pipe("/set/first.png", b"other")
    assert local_copy("memory://set/first.png", "image").read_bytes() == b"other" != before.read_bytes()


@pytest.mark.parametrize("url, says", [("memory://set/gone.mp4", "no such file or folder"), ("nonsense://set/a.mp4", "cannot be read")])
def test_what_is_not_there_is_named(store, tmp_path, url, says):
    with pytest.raises(UserError, match=rf"source '{url}': {says}"):
        local_copy(url, "source")
    assert not any("partial" in path.name for path in (tmp_path / "copies").glob("*"))


@pytest.mark.parametrize(
    "path",
    [
        "../other/a.mp4",
        "file:///etc/hostname",
        "local://etc/hostname",
        "simplecache::file:///etc/hostname",
        "zip://x::file:///etc/a.zip",
        "/etc/hostname",
        "C:\\\\a.mp4",
    ],
)
def test_no_url_leads_back_to_this_machine(store, path):
    store.pipe("/set/pairs.jsonl", LINE.replace("clips/a.mp4", path).encode())
    with pytest.raises(UserError, match=r"memory://set/pairs\.jsonl:1:2: .*(outside|by one protocol|not a path relative|relative to the manifest)"):
        read_manifest("memory://set/pairs.jsonl")


def test_without_fsspec_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match=r"needs the package fsspec"):
        read_manifest("memory://set/pairs.jsonl")


def test_a_missing_protocol_says_what_to_install():
    if "s3fs" in sys.modules:
        pytest.skip("s3fs is here")
    with pytest.raises(UserError, match=r"s3://bucket/pairs\.jsonl.*(needs one more package.*s3fs|cannot be read)"):
        read_manifest("s3://bucket/pairs.jsonl")
