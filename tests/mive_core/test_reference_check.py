"""References that are no edited first frame of the clip are told of, true ones are not."""

from pathlib import Path

import pytest
import skimage.data
import torch
from torch.nn import functional as F

import mive_core
from mive_core.embedded.challenge import EDITS, KINDS, ChallengePairs
from mive_core.embedded.heldout import drawn_pairs, footage_pairs, look_strength_pairs, unseen_look_pairs
from mive_core.embedded.synthetic import PairedEdits
from mive_core.media.fit import resize_and_crop
from mive_core.media.video import read_clip
from mive_core.reference_check import describe_reference, warn_of_references
from mive_core.registration import warp
from mive_core.types import Clip, Keyframe

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
UNEDITED = ("enters late", "nothing asked", "words alone", "instruction only", "two alike", "absent", "keep")


def photo(name: str, size: tuple[int, int] = (192, 112)) -> torch.Tensor:
    return resize_and_crop(torch.from_numpy(getattr(skimage.data, name)()).float()[None] / 255, size)[0]


def night(image: torch.Tensor) -> torch.Tensor:
    return image.pow(1.8) * torch.tensor([0.1, 0.16, 0.35])


def sketch(image: torch.Tensor) -> torch.Tensor:
    """Dark lines on white paper: the brightness over its blurred self."""
    gray = image.mean(dim=-1)
    blurred = F.avg_pool2d(gray[None, None], 7, 1, 3, count_include_pad=False)[0, 0]
    return (gray / (blurred + 0.02)).clamp(0, 1)[..., None].expand(-1, -1, 3)


def another_background(image: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    edited = other.clone()
    edited[24:104, 64:130] = image[24:104, 64:130]
    return edited


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return read_clip(SAMPLE).frames


def test_no_false_alarm_on_generated_pairs(frames):
    """Looks of four strengths, drawn objects, backgrounds: more than a hundred. Some show no edit, which is all that may be said of them."""
    clip, small = Clip(frames[:5], 24.0), resize_and_crop(frames[:17], (96, 96))
    sets = [footage_pairs(clip), unseen_look_pairs(clip), look_strength_pairs(clip)]
    sets += [ChallengePairs(seed, (96, 96), 17, KINDS, EDITS, footage).pairs(24) for seed, footage in ((3, None), (4, small))]
    sets.append(drawn_pairs(PairedEdits(5, "heldout", (96, 96), 17), 24))
    count, unedited = 0, 0
    for pair, labels in (item for items in sets for item in items):
        found = describe_reference(pair.request.reference, pair.request.source.frames)
        without = found is not None and "without an edit" in found
        assert found is None or (without and {labels["kind"], labels["edit"]} & set(UNEDITED)), (pair.name, labels, found)
        count, unedited = count + 1, unedited + without
    assert count > 100 and 5 < unedited < count / 2


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("edit", [night, sketch, lambda x: 1 - x, lambda x: 0.6 + 0.3 * x], ids=["night", "sketch", "negative", "fog"])
def test_strong_edits_are_no_other_picture(name, edit):
    assert describe_reference(edit(photo(name)), photo(name)[None]) is None


@pytest.mark.parametrize("name, other", list(zip(PHOTOS, PHOTOS[1:] + PHOTOS[:1])))
def test_an_unrelated_picture_is_told_of(name, other):
    """Whatever its look; one that keeps the subject before another background is an edit."""
    clip = photo(name)[None]
    for reference in (photo(other), night(photo(other)), sketch(photo(other))):
        assert "it has nothing in common with the source's first frame" in str(describe_reference(reference, clip))
    assert describe_reference(another_background(photo(name), photo(other)), clip) is None


@pytest.mark.parametrize(
    "zoom, x, y, said", [(1.0, 0.12, 0.0, "moved right by 6%"), (1.0, -0.1, 0.1, "moved left by 5%, moved down by 5%"), (1.06, 0.0, 0.0, "enlarged by 6%")]
)
@pytest.mark.parametrize("name", PHOTOS)
def test_another_framing_is_told_of(name, zoom, x, y, said):
    """In words of the picture: where its content went."""
    moved = warp(night(photo(name)), torch.tensor([1 / zoom, -x / zoom, -y / zoom]))
    found = str(describe_reference(moved, photo(name)[None]))
    assert said in found and "MiVE Register Reference, or --register" in found


@pytest.mark.parametrize("name", PHOTOS[:3])  # the fourth is a sky, which fits everywhere
def test_a_section_is_told_of(name):
    """Half of the picture, as a square crop of a wide one has it."""
    enlarged = warp(night(photo(name)), torch.tensor([1 / 1.5, 0.0, 0.0]))
    assert "it shows another section than the source's first frame: enlarged by" in str(describe_reference(enlarged, photo(name)[None]))


def test_a_later_frame_is_told_of(frames):
    assert "it looks like frame 32 of the source" in str(describe_reference(night(frames[32]), frames))
    assert describe_reference(night(frames[0]), frames) is None


def test_the_size_of_the_reference_does_not_matter(frames):
    large = F.interpolate(frames[:1].movedim(-1, 1), scale_factor=3, mode="bicubic")[0].movedim(0, -1).clamp(0, 1)
    assert describe_reference(night(large), frames) is None
    assert "without an edit" in str(describe_reference(large, frames))


def test_keyframes_are_compared_with_their_own_frames(frames):
    right, wrong = (Keyframe(32, night(frames[number])) for number in (32, 0))
    with pytest.warns(UserWarning, match="keyframe 32: it looks like frame 0 of the source, not like the source's frame 32"):
        warn_of_references(frames, night(frames[0]), [wrong])
    for reference in (night(frames[0]), frames[0]):  # the keyframe shows the edit
        warn_of_references(frames, reference, [right])


def test_flat_pictures_say_nothing(frames):
    assert describe_reference(torch.zeros_like(frames[0]), frames) is None
    assert describe_reference(night(frames[0]), torch.full_like(frames, 0.5)) is None
