import pytest
import torch

from mive_core.data.folder import read_folder, read_pairs
from mive_core.data.manifest import export_pairs, load_entry
from mive_core.errors import UserError
from mive_core.media.images import write_frames, write_image
from mive_core.media.video import write_video
from mive_core.types import Clip, EditRequest, PairedEdit


def frames(seed: int, num_frames: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (num_frames, 32, 48, 3), generator=torch.Generator().manual_seed(seed)) / 255


@pytest.fixture
def folder(tmp_path):
    """Two pairs: `a` as folders of frames with words, mask and reference of its own, `b` as videos."""
    for kind, seed in (("source", 0), ("target", 1), ("mask", 2)):
        write_frames(tmp_path / kind / "a", frames(seed))
    (tmp_path / "reference").mkdir()
    write_image(tmp_path / "reference" / "a.png", frames(3)[0])
    write_video(tmp_path / "source" / "b.mp4", Clip(frames(4), 8.0))
    write_video(tmp_path / "target" / "b.mkv", Clip(frames(5), 8.0))
    (tmp_path / "a.txt").write_text("\ufeffmake it\nred \n", encoding="utf-8")
    (tmp_path / "instruction.txt").write_text("make it blue")
    (tmp_path / "source" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "source" / "Thumbs.db").write_bytes(b"\0")
    return tmp_path


def test_names_bring_clips_and_words_together(folder):
    a, b = read_folder(folder)
    assert (a.name, a.instruction, b.name, b.instruction) == ("a", "make it red", "b", "make it blue")
    assert (b.source.name, b.target.name, b.reference, b.mask) == ("b.mp4", "b.mkv", None, None)
    first = load_entry(a)
    assert torch.equal(first.request.source.frames, frames(0)) and torch.equal(first.target, frames(1))
    assert torch.equal(first.request.reference, frames(3)[0]) and first.mask.any()
    second = load_entry(b)
    assert torch.equal(second.request.reference, second.target[0])


def test_a_manifest_is_read_as_one(tmp_path):
    pair = PairedEdit(EditRequest(Clip(frames(0), 8.0), frames(1)[0], "make it red"), frames(1), None, "one")
    (entry,) = read_pairs(export_pairs([(pair, {})], tmp_path / "set"))
    assert (entry.name, entry.instruction) == ("one", "make it red")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda f: [(f / "target" / "b.mkv").unlink()], "a source has no target of its name; got b.mp4"),
        (lambda f: [(f / "source" / "b.mp4").unlink()], "a target has no source of its name; got b.mkv"),
        (lambda f: [write_image(f / "reference" / "c.png", frames(3)[0])], "a reference has no source of its name; got c.png"),
        (
            lambda f: [(f / "instruction.txt").unlink()],
            "a pair has no instruction; got no words in b.txt; expected a text for each pair, or instruction.txt for all",
        ),
        (lambda f: [(f / "a.txt").write_text(" \n")], "no words in a.txt"),
        (lambda f: [(f / "a.txt").write_bytes(b"\xff\xfe\x00")], "is not UTF-8 text"),
        (lambda f: [write_video(f / "source" / "a.mp4", Clip(frames(0), 8.0))], "two sources have one name; got a, a.mp4"),
        (lambda f: [(f / "source" / "c.mp4").symlink_to("/etc/hosts"), (f / "target" / "c.mp4").symlink_to("/etc/hosts")], "leads outside the folder"),
    ],
    ids=["no target", "no source", "no source for a reference", "no words", "empty words", "no text", "one name twice", "link"],
)
def test_what_is_missing_is_named(folder, spoil, said):
    spoil(folder)
    with pytest.raises(UserError) as caught:
        read_folder(folder)
    assert said in str(caught.value)


def test_another_folder_is_told_the_layout(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(UserError, match=r"holds no pairs; got readme.md; expected source/NAME.mp4, target/NAME.mp4 and NAME.txt"):
        read_pairs(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        read_pairs(tmp_path / "gone")


def test_many_names_are_not_all_listed(folder):
    for name in "cdefg":
        write_frames(folder / "source" / name, frames(0))
    with pytest.raises(UserError, match="got c, d, e and 2 more"):
        read_folder(folder)
