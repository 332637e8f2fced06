import pytest
import torch

from mive_core.cli import main
from mive_core.data.folder import read_folder
from mive_core.data.manifest import ManifestPairs
from mive_core.embedded.sample_pairs import HELD_OUT_PARTS, NUM_FRAMES, PARTS, SAMPLES, SIDE, neon, television
from mive_core.media.fit import fit_clip
from mive_core.media.images import read_image
from mive_core.media.video import read_clip


def test_the_shipped_pairs_are_a_look_and_its_outcome():
    """To the codec's loss; the parts differ."""
    pairs = ManifestPairs(read_folder(SAMPLES / "pairs"))
    assert len(pairs) == len(PARTS)
    for pair in pairs:
        source = pair.request.source.frames
        assert source.shape == pair.target.shape == (NUM_FRAMES, SIDE, SIDE, 3) and pair.request.instruction == "make it glow like neon"
        assert (neon(source) - pair.target).abs().mean() < 0.04 < 0.2 < (source - pair.target).abs().mean()  # a codec halves the colours' resolution
    assert (pairs[0].target - pairs[1].target).abs().mean() > 0.1


def test_the_shipped_reference_is_the_sample_clips_first_frame():
    clip = fit_clip(read_clip(SAMPLES / "bigbuckbunny_33f.mp4"), (SIDE, SIDE), 1)
    assert torch.allclose(read_image(SAMPLES / "neon.png"), neon(clip.frames[0]), atol=0.5 / 255 + 1e-6)


@pytest.mark.slow
def test_the_first_training_has_held_out_pairs(tmp_path, capsys):
    """Other parts of the clip than those that are trained on, with the same look."""
    assert main(["data", "samples", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "pairs"), str(tmp_path / "heldout")]
    pairs, held_out = (ManifestPairs(read_folder(tmp_path / name)) for name in ("pairs", "heldout"))
    assert (len(pairs), len(held_out)) == (len(PARTS), len(HELD_OUT_PARTS)) and not PARTS.keys() & HELD_OUT_PARTS.keys()
    for pair in (*pairs, *held_out):
        assert pair.request.instruction == "make it look like an old television"
        assert (television(pair.request.source.frames) - pair.target).abs().mean() < 0.03 < 0.1 < (pair.request.source.frames - pair.target).abs().mean()
