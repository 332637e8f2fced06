import numpy as np
import pytest
import torch
from PIL import Image

from mive_core.errors import UserError
from mive_core.evaluation.contact_sheet import GAP, LABEL_WIDTH, MARGIN, NUM_COLUMNS, draw_sheet, make_band, write_sheet
from mive_core.types import Clip, EditRequest


def flat(num_frames: int, color: tuple[float, float, float], height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.tensor(color).expand(num_frames, height, width, 3).contiguous()


def request(num_frames: int = 17, instruction: str = "make it red") -> EditRequest:
    source = flat(num_frames, (0.0, 0.0, 0.0)) + torch.linspace(0, 1, num_frames)[:, None, None, None]
    return EditRequest(Clip(source, 8.0), flat(1, (1.0, 0.0, 0.0))[0], instruction)


def test_rows_stand_in_order_over_time():
    """Every cell shows the frame it should: source gets lighter, ours is green, truth blue, the reference red once."""
    band = make_band(request(), flat(17, (0.0, 1.0, 0.0)), flat(17, (0.0, 0.0, 1.0)), cell_side=48)
    assert band.times == (0, 0.375, 0.75, 1.25, 1.625, 2.0)
    sheet = np.asarray(draw_sheet([band])).astype(int)
    left, top = MARGIN + LABEL_WIDTH, MARGIN + 20 + 22
    cells = [[sheet[top + row * (32 + GAP) + 16, left + column * (48 + GAP) + 24] for column in range(NUM_COLUMNS)] for row in range(4)]
    assert [cell[0] for cell in cells[0]] == [0, 48, 96, 159, 207, 255]
    assert cells[1][0].tolist() == [255, 0, 0]
    assert all(cell.tolist() == [0, 255, 0] for cell in cells[2])
    assert all(cell.tolist() == [0, 0, 255] for cell in cells[3])


def test_a_clip_without_truth_has_three_rows():
    with_truth = draw_sheet([make_band(request(), flat(17, (0.0, 1.0, 0.0)), flat(17, (0.0, 0.0, 1.0)))])
    without = draw_sheet([make_band(request(), flat(17, (0.0, 1.0, 0.0)))])
    assert without.width == with_truth.width and without.height < with_truth.height


@pytest.mark.parametrize("num_frames", [1, 5, 17])
def test_short_clips(num_frames):
    band = make_band(request(num_frames), flat(num_frames, (0.0, 1.0, 0.0)))
    assert len(band.times) == min(num_frames, NUM_COLUMNS)
    draw_sheet([band])


def test_bands_fill_columns_then_lines():
    band = make_band(request(), flat(17, (0.0, 1.0, 0.0)), notes=("late", "edited 20.1 dB"))
    one, four = draw_sheet([band]), draw_sheet([band] * 4, "four clips", across=2)
    assert four.width == 2 * one.width - MARGIN
    assert one.height * 2 < four.height < one.height * 2 + 60


@pytest.mark.parametrize("instruction", ["", "word " * 400, "x" * 5000, "日本語 مرحبا 🎬 é", "two\nlines"])
def test_any_instruction_is_drawn_within_the_sheet(instruction):
    plain = draw_sheet([make_band(request(), flat(17, (0.0, 1.0, 0.0)))])
    sheet = draw_sheet([make_band(request(instruction=instruction), flat(17, (0.0, 1.0, 0.0)), notes=(instruction,))])
    assert sheet.width == plain.width and sheet.height <= plain.height + 20


def test_sheets_are_written_whole(tmp_path):
    band = make_band(request(), flat(17, (0.0, 1.0, 0.0)))
    with Image.open(write_sheet(tmp_path / "sheet.png", [band])) as sheet:
        assert sheet.size == draw_sheet([band]).size
    with pytest.raises(UserError, match="unsupported file type"):
        write_sheet(tmp_path / "sheet.bmp", [band])
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
