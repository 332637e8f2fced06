"""Delivery: frames of the source's size, one by one, whatever comes in."""

import weakref
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import mive_core
from mive_core.delivery import CHUNK, LARGEST_WINDOW, EditedFrame, deliver, deliver_stream, feathered, find_shots
from mive_core.errors import UserError
from mive_core.media.video import read_clip

SAMPLE = Path(mive_core.__file__).parent / "assets" / "samples" / "bigbuckbunny_33f.mp4"


@pytest.fixture(scope="module")
def source():
    return read_clip(SAMPLE).frames[:21]


def small(frames: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(frames.movedim(-1, 1), 2).movedim(1, -1)


def night(frames: torch.Tensor) -> torch.Tensor:
    return frames * torch.tensor([0.3, 0.4, 0.8])


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * (a - b).square().mean().clamp(min=1e-12).log10()).item()


def run(frames, edited, round_trip, *rest, **options) -> torch.Tensor:
    return torch.stack(list(deliver(iter(frames), edited, round_trip, *rest, **options)))


def test_a_clip_longer_than_a_chunk_has_no_seam(source):
    assert len(source) > CHUNK
    out = run(source, small(night(source)), small(source))
    errors = [psnr(a, b) for a, b in zip(out, night(source))]
    assert min(errors) > 32 and max(errors) - min(errors) < 3


def test_the_reference_anchors_every_frame(source):
    weak = source + 0.6 * (night(source) - source)
    plain, anchored = (run(source, small(weak), small(source), night(source)[0], anchor=anchor) for anchor in ("off", "auto"))
    assert psnr(plain, night(source)) < 28 and psnr(anchored, night(source)) > 38


def local_edit(frames: torch.Tensor) -> torch.Tensor:
    """A third of the picture is inverted."""
    edited = frames.clone()
    edited[..., 30:90, 40:110, :] = 1 - edited[..., 30:90, 40:110, :]
    return edited


@pytest.mark.parametrize("gain, offset", [((1.1, 1.0, 0.9), 0.0), ((0.9, 0.9, 0.9), 0.05), ((1.06, 0.97, 0.92), 0.02)])
def test_a_cast_of_the_reference_is_not_carried_on(source, gain, offset):
    """Image editors tint what they return; the anchor took that for the edit and lost 9 dB."""
    truth = local_edit(source[:9])
    reference = (truth[0] * torch.tensor(gain) + offset).clamp(0, 1)
    off, auto = (psnr(run(source[:9], small(truth), small(source[:9]), reference, anchor=anchor), truth) for anchor in ("off", "auto"))
    assert auto > off - 0.1


def test_a_reference_that_shows_no_edit_undoes_none(source):
    """Words alone ask for the edit: the reference is the source's first frame."""
    edited = small(night(source))
    plain, auto = (run(source, edited, small(source), source[0], anchor=anchor) for anchor in ("off", "auto"))
    assert torch.equal(plain, auto)
    assert psnr(run(source, edited, small(source), source[0], anchor="on"), source) > psnr(plain, source) + 5  # on is the user's word


def test_a_keyframe_anchors_what_frame_0_does_not_hold(source):
    """A red patch enters at frame 8 and is to be blue; the edit makes it purple."""
    before, truth, edited = source.clone(), source.clone(), source.clone()
    for frames, colour in ((before, (0.9, 0.1, 0.1)), (truth, (0.1, 0.2, 0.9)), (edited, (0.5, 0.1, 0.5))):
        frames[8:, 30:70, 60:120] = torch.tensor(colour)
    plain = run(before, small(edited), small(before), before[0])
    keyed = run(before, small(edited), small(before), before[0], keyframes=[EditedFrame(12, before[12], truth[12])])
    patch = (slice(8, None), slice(32, 68), slice(62, 118))
    assert psnr(plain[patch], truth[patch]) < 14 and psnr(keyed[patch], truth[patch]) > 30
    assert psnr(keyed[:8], truth[:8]) > 45
    off = run(before, small(edited), small(before), before[0], anchor="off", keyframes=[EditedFrame(12, before[12], truth[12])])
    assert torch.equal(off, run(before, small(edited), small(before), anchor="off"))


def test_each_shot_by_itself(source):
    """A cut to another picture: nothing of one shot is in the other's maps."""
    cut = torch.cat([source[:8], 1 - source[8:16].flip(2)])
    edited = torch.cat([small(night(cut[:8])), small(cut[8:])])  # the edit acts in the first shot alone
    assert find_shots(small(cut)) == [0, 8] and find_shots(small(source)) == [0]
    out = run(cut, edited, small(cut))
    assert torch.equal(out[8:], run(cut[8:], edited[8:], small(cut[8:]))) and torch.equal(out[:8], run(cut[:8], edited[:8], small(cut[:8])))
    assert psnr(out[8], cut[8]) > 45 and psnr(out[7], night(cut[7])) > 30


@pytest.mark.parametrize("num_masks", [1, 5])
def test_outside_of_the_mask_the_source_comes_back_exactly(source, num_masks):
    mask = torch.zeros(num_masks, 28, 48)
    mask[:, :, :24] = 1
    out = run(source[:5], small(night(source[:5])), small(source[:5]), None, mask)
    assert torch.equal(out[:, :, 98:], source[:5, :, 98:])
    assert psnr(out[:, :, :80], night(source[:5, :, :80])) > 32
    edge = feathered(mask[0], (112, 192))
    assert edge.min() == 0 and edge.max() == 1 and ((edge > 0.1) & (edge < 0.9)).any()


def test_an_edit_that_is_the_source_gives_the_source(source):
    assert psnr(run(source[:5], small(source[:5]), small(source[:5]), source[0]), source[:5]) > 50


def test_one_frame_of_an_odd_size(source):
    frame = F.interpolate(source[:1].movedim(-1, 1), (113, 191), mode="bilinear").movedim(1, -1)
    out = run(frame, small(night(source[:1])), small(source[:1]), night(source[0]))
    assert out.shape == (1, 113, 191, 3) and psnr(out, night(frame)) > 32


def test_frames_are_held_one_at_a_time(source):
    """The source is asked for a frame only when the one before has been delivered."""
    pulled = []

    def frames():
        for index, frame in enumerate(source):
            pulled.append(index)
            yield frame

    for index, _ in enumerate(deliver(frames(), small(night(source)), small(source))):
        assert pulled[-1] == index


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frames": 4}, "the source is shorter than its edit; got 4 frames; expected 5"),
        ({"frames": 6}, "the source is longer than its edit; got more than 5 frames; expected 5"),
        ({"round_trip": slice(0, 4)}, "the edit and the source's round trip differ"),
        ({"mask": torch.ones(3, 8, 8)}, "the mask does not fit the clip"),
        ({"anchor": "sometimes"}, "unknown anchor"),
        ({"anchor": "on", "reference": None}, "an anchor needs a reference"),
        ({"nan": "edited"}, "edited: NaN or infinite values"),
        ({"nan": "source"}, "source: NaN or infinite pixels; got frame 2"),
        ({"nan": "reference"}, "reference: NaN or infinite values"),
    ],
)
def test_bad_input(source, change, message):
    frames, edited, round_trip = source[: change.get("frames", 5)].clone(), small(night(source[:5])), small(source[:5])
    reference = change.get("reference", night(source[0]))
    for name, value in {"edited": edited, "source": frames, "reference": reference}.items():
        if change.get("nan") == name:
            value[2 if value.ndim == 4 else slice(None), 3] = float("nan")
    with pytest.raises(UserError, match=message):
        run(frames, edited, round_trip[change.get("round_trip", slice(None))], reference, change.get("mask"), anchor=change.get("anchor", "auto"))


def test_an_empty_mask_is_told_of(source):
    with pytest.warns(UserWarning, match="the mask is empty"):
        out = run(source[:2], small(night(source[:2])), small(source[:2]), None, torch.zeros(1, 8, 8))
    assert torch.equal(out, source[:2])


class Pairs:
    """Edit and round trip made anew frame by frame, at each iteration, and the largest number of pairs that were alive at once."""

    def __init__(self, source: torch.Tensor):
        self.source, self.alive, self.most, self.iterations, self.given = source, 0, 0, 0, 0

    def __iter__(self):
        self.iterations += 1
        for frame in self.source:
            pair = small(night(frame)[None])[0], small(frame[None])[0]
            self.alive, self.given = self.alive + 1, self.given + 1
            self.most = max(self.most, self.alive)
            weakref.finalize(pair[0].untyped_storage(), self.die)
            yield pair

    def die(self):
        self.alive -= 1


@pytest.mark.parametrize("num_frames", [60, 119])
def test_a_stream_is_delivered_from_a_window_of_pairs(source, num_frames):
    """A still with a cut in it, at the length that chunks are fitted over and at twice that."""
    frames = torch.cat([source[:1].expand(num_frames - 23, -1, -1, -1), 1 - source[-1:].expand(23, -1, -1, -1)])
    pairs = Pairs(frames)
    out = torch.stack([frame.clone() for frame in deliver_stream(iter(frames), pairs, num_frames, night(source)[0])])
    assert pairs.iterations == 1 and CHUNK < pairs.most <= LARGEST_WINDOW + 2
    assert torch.equal(out, run(frames, small(night(frames)), small(frames), night(source)[0]))


def test_later_keyframes_are_learned_from_in_a_first_pass(source):
    frames, number = source[:1].expand(70, -1, -1, -1), 40
    pairs, keyframes = Pairs(frames), [EditedFrame(number, frames[number], night(frames)[number])]
    out = torch.stack(list(deliver_stream(iter(frames), pairs, 70, keyframes=keyframes)))
    assert pairs.iterations == 2 and 70 + number < pairs.given < 70 + number + 10 and pairs.most <= LARGEST_WINDOW + 2
    assert torch.equal(out, run(frames, small(night(frames)), small(frames), keyframes=keyframes))
    without = Pairs(frames)
    list(deliver_stream(iter(frames), without, 70, keyframes=keyframes, anchor="off"))
    assert without.iterations == 1


def test_a_stream_with_a_broken_frame_is_named(source):
    bad = small(source).clone()
    bad[19] = torch.nan
    delivered = deliver_stream(iter(source), list(zip(bad, small(source))), len(source))
    with pytest.raises(UserError, match="NaN or infinite values; got frame 19"):
        list(delivered)
