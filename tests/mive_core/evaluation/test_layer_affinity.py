"""The attention mask ratio of a layer, on states whose affinity is known and on a real VLM."""

import json
import math
from pathlib import Path

import pytest
import skimage.data
import torch
from PIL import Image

from mive_core.cli import main
from mive_core.config import config_for
from mive_core.errors import UserError
from mive_core.evaluation.layer_affinity import check_mask, coverage, describe_affinities, linear_map, measure_layers, softmax_map, token_cosines, top_share
from mive_core.evaluation.layer_pictures import draw_heat_map, draw_layers
from mive_core.media.images import read_image, write_image
from mive_core.prompt import build_image_inputs, build_inputs, instruction_tokens
from mive_core.types import Clip, EditRequest
from mive_core.vlm import VLM

TINY = Path(__file__).resolve().parents[3] / "mive_core" / "assets" / "tiny" / "vlm"
WORDS = "make the red circle blue"


@pytest.fixture(scope="module")
def tiny() -> VLM:
    return VLM.load(TINY)


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    return torch.from_numpy(skimage.data.astronaut()[40:232:1, 100:420:1]).float()[::2, ::2] / 255  # (96, 160, 3)


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    mask = torch.zeros(96, 160, dtype=torch.bool)
    mask[16:64, 32:96] = True
    return mask


def test_a_map_that_is_equal_everywhere_has_the_masks_share():
    cosines = torch.full((3, 60), 0.4)
    inside = coverage(torch.arange(96 * 160).view(96, 160) < 96 * 40, (6, 10))
    for density in (softmax_map(cosines, 128), linear_map(cosines)):
        assert float((density.view(6, 10) * inside).sum()) == pytest.approx(0.25, abs=1e-6)
        assert top_share(density.view(6, 10)) == pytest.approx(0.1, abs=1e-6)


def test_an_affinity_that_points_at_the_mask_lies_in_it():
    """Two of 60 image tokens are the text's own direction, the others are orthogonal to it: by hand, e^s / (2 e^s + 58) each, s = sqrt(128)."""
    text = torch.zeros(2, 128).index_fill(1, torch.tensor([0]), 7.0)
    vision = torch.zeros(60, 128)
    vision[:, 1] = torch.linspace(1, 300, 60)
    vision[:2] = text * 0.01
    cosines = token_cosines(text, vision)
    expected = math.exp(128**0.5) / (2 * math.exp(128**0.5) + 58)
    torch.testing.assert_close(softmax_map(cosines, 128)[:2], torch.full((2,), expected))
    torch.testing.assert_close(linear_map(cosines), torch.tensor([0.5, 0.5] + 58 * [0.0]))


def test_lengths_of_states_do_not_count():
    generator = torch.Generator().manual_seed(0)
    text, vision = torch.randn(4, 128, generator=generator), torch.randn(60, 128, generator=generator)
    torch.testing.assert_close(token_cosines(1000 * text, vision * torch.rand(60, 1, generator=generator)), token_cosines(text, vision))


def test_the_states_are_those_that_the_dit_gets(tiny, photograph):
    """The VLM is causal: with the source after the image, the states up to the image's end stay the same."""
    config = config_for(tiny.name)
    alone = build_image_inputs(photograph, WORDS, tiny.processor, config)
    whole = build_inputs(EditRequest(Clip(photograph.expand(9, -1, -1, -1), 8.0), photograph, WORDS), tiny.processor, config)
    end = int(alone.mm_token_type_ids[0].nonzero()[-1]) + 1
    assert torch.equal(alone.input_ids[:, :end], whole.input_ids[:, :end]) and whole.input_ids.shape[1] > end + 60
    layers = (0, 1, 2, 3, 4)
    ours, theirs = tiny.encode(alone, layers).states[:, :, :end], tiny.encode(whole, layers).states[:, :, :end]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_instructions_tokens_are_its_own(tiny, photograph):
    inputs = build_image_inputs(photograph, WORDS, tiny.processor, config_for(tiny.name))
    places = instruction_tokens(inputs, tiny.processor)
    assert tiny.processor.tokenizer.decode(inputs.input_ids[0, places]) == WORDS


def test_every_layer_by_hand(tiny, photograph, mask):
    """R_mask from the states themselves, written out."""
    found = measure_layers(tiny, photograph, WORDS, range(5), mask)
    inputs = build_image_inputs(photograph, WORDS, tiny.processor, config_for(tiny.name))
    states = tiny.encode(inputs, (0, 1, 2, 3, 4)).states[0]
    text, image = instruction_tokens(inputs, tiny.processor), inputs.mm_token_type_ids[0] == 1
    inside = torch.zeros(6, 10)
    inside[1:4, 2:6] = 1
    for row, state in zip(found.layers, states, strict=True):
        normalised = state / state.square().mean(dim=-1, keepdim=True).sqrt()
        a = (normalised[text] @ normalised[image].T / 128**0.5).softmax(dim=-1)
        assert row.ratio == pytest.approx(float((a * inside.flatten()).sum(dim=-1).mean()), abs=1e-5)
        assert float(row.map.sum()) == pytest.approx(1, abs=1e-5)
    assert found.mask_share == pytest.approx(0.2) and [row.layer for row in found.layers] == [0, 1, 2, 3, 4]
    assert len({round(row.ratio, 4) for row in found.layers}) == 5


def test_layer_1_of_the_tiny_vlm_knows_where(tiny):
    """It was taught to match the instruction with what is edited; on clips it never saw, its map lies in the mask more than an equal one would."""
    from mive_core.embedded.synthetic import PairedEdits

    edits, gains = PairedEdits(5, size=(160, 96), edits=("recolour",)), []
    for index in range(24):
        pair = edits.sample(index).pair
        if pair.request.instruction.strip() and pair.mask[0].any() and not pair.mask[0].all():
            found = measure_layers(tiny, pair.request.source.frames[0], pair.request.instruction, (1,), pair.mask[0])
            gains.append(found.layers[0].ratio / found.mask_share)
    assert len(gains) >= 8 and sum(gains) / len(gains) > 1.3


def test_a_fifth_row_of_pixels_counts_by_its_share():
    mask = torch.zeros(96, 160, dtype=torch.bool)
    mask[:4] = True
    assert coverage(mask, (6, 10))[:2].tolist() == [10 * [0.25], 10 * [0.0]]


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.zeros(96, 160, dtype=torch.bool), "mask: the mask is empty"),
        (torch.ones(96, 160, dtype=torch.bool), "covers the whole image"),
        (torch.ones(48, 80, dtype=torch.bool), "got 80x48; expected 160x96"),
    ],
)
def test_masks_that_tell_nothing_are_refused(mask, said):
    with pytest.raises(UserError, match=said):
        check_mask(mask, torch.zeros(96, 160, 3))


def test_without_a_mask_there_is_no_ratio(tiny, photograph):
    found = measure_layers(tiny, photograph, WORDS, (1, 4))
    assert found.mask_share is None and found.layers[0].ratio is None and 0.1 < found.layers[0].top_share < 1
    assert "no mask" in describe_affinities(found) and "0.366" not in describe_affinities(found)


def test_pictures_show_the_map(tiny, photograph, mask):
    found = measure_layers(tiny, photograph, WORDS, (1, 2, 4), mask)
    heat = draw_heat_map(photograph, found.layers[0])
    assert heat.shape == (288, 480, 3) and 0 <= heat.min() and heat.max() <= 1
    row, column = divmod(int(found.layers[0].map.argmax()), 10)
    hottest, dimmest = (48 * row + 24, 48 * column + 24), divmod(int(found.layers[0].map.argmin()), 10)
    assert heat[hottest][0] > heat[48 * dimmest[0] + 24, 48 * dimmest[1] + 24][0] + 0.2
    assert draw_layers(found).size == (960, 460)
    assert draw_layers(measure_layers(tiny, photograph, WORDS, (4,))).size == (960, 460)


@pytest.fixture
def files(tmp_path, photograph, mask) -> Path:
    write_image(tmp_path / "image.png", photograph)
    write_image(tmp_path / "mask.png", mask)
    write_image(tmp_path / "small.png", mask[::2, ::2])
    write_image(tmp_path / "black.png", torch.zeros_like(mask))
    return tmp_path


def inspect(files: Path, *options: str) -> int:
    return main(["inspect", "layers", "--image", str(files / "image.png"), "--instruction", WORDS, "--output", str(files / "out"), *options])


def test_the_command_writes_numbers_and_pictures(files, tiny, photograph, mask):
    assert inspect(files, "--mask", str(files / "mask.png")) == 0
    report = json.loads((files / "out" / "layers.json").read_text())
    expected = measure_layers(tiny, read_image(files / "image.png"), WORDS, (1, 2, 3, 4), mask)
    assert [row["ratio"] for row in report["layers"]] == pytest.approx([row.ratio for row in expected.layers], abs=1e-6)
    assert report["vlm"] == "Qwen3-VL-tiny" and report["paper"]["ratio_first_and_last"]["Qwen3-VL-8B"] == [0.366, 0.228]
    assert sorted(path.name for path in (files / "out").iterdir()) == [*(f"layer_0{k}.png" for k in (1, 2, 3, 4)), "layers.json", "plot.png"]
    with Image.open(files / "out" / "layer_01.png") as picture:
        assert picture.size == (480, 288)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--layers", "1,99"], "no layer 99"),
        (["--mask", "{}/small.png"], "got 80x48; expected 160x96"),
        (["--mask", "{}/black.png"], "the mask is empty"),
        (["--mask", "{}/none.png"], "no such file"),
        (["--models", "{}/none"], "no such file or folder"),
        (["--models", "{}"], "the VLM folder lacks files"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(files, capsys, options, said):
    assert inspect(files, *(option.format(files) for option in options)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (files / "out").exists()


def test_an_empty_instruction_is_refused(files, capsys):
    arguments = ["inspect", "layers", "--image", str(files / "image.png"), "--instruction", "  ", "--output", str(files / "out")]
    assert main(arguments) == 2 and "the instruction is empty" in capsys.readouterr().err


def test_a_checkpoint_is_still_inspected(capsys):
    assert main(["inspect", str(TINY.parent / "dit.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["width"] == 256
    assert main(["inspect", "layers.safetensors"]) == 2
