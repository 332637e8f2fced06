"""Contact sheets: pictures that show the source, reference, edit and ground truth of clips over time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..media.fit import resize_and_crop
from ..media.paths import atomic_write, check_output
from ..types import EditRequest

NUM_COLUMNS = 6
GAP, MARGIN, LABEL_WIDTH = 4, 16, 84
PAPER, INK, FAINT, RULE = (250, 250, 248), (28, 28, 32), (120, 120, 126), (222, 222, 218)


@dataclass(frozen=True)
class Band:
    """One clip on a sheet. Holds only the frames that are shown, as bytes."""

    title: str
    notes: tuple[str, ...]  # short lines beside the reference
    times: tuple[float, ...]  # seconds, one per column
    reference: np.ndarray  # (h, w, 3) uint8
    rows: tuple[tuple[str, np.ndarray], ...]  # (label, (columns, h, w, 3) uint8); the source comes first


def make_band(
    request: EditRequest,
    edited: Tensor,
    target: Tensor | None = None,
    *,
    delivered: Tensor | None = None,
    before: Tensor | None = None,
    notes: Sequence[str] = (),
    title: str | None = None,
    cell_side: int = 160,
) -> Band:
    """Picks NUM_COLUMNS frames and scales them so that the longer side is `cell_side`.

    `edited` and `target` are (F, H, W, 3) in 0..1, like the request's source; `delivered` is the edit at the source's own size, `before` another
    model's edit, shown above. The title defaults to the instruction.
    """
    source = request.source
    columns = np.unique(np.linspace(0, len(source.frames) - 1, NUM_COLUMNS).round().astype(int))
    rows: list[tuple[str, Tensor]] = [("source", source.frames)]
    named = ("before", before), ("ours" if before is None else "after", edited), ("delivered", delivered), ("truth", target)
    rows += [(label, frames) for label, frames in named if frames is not None]
    return Band(
        request.instruction if title is None else title,
        tuple(notes),
        tuple(columns / source.fps),
        _cells(request.reference[None], cell_side)[0],
        tuple((label, _cells(frames[columns], cell_side)) for label, frames in rows),
    )


def draw_sheet(bands: Sequence[Band], heading: str = "", across: int = 1) -> Image.Image:
    """Draws the bands in `across` columns under an optional heading."""
    pictures = [_draw_band(band) for band in bands]
    top = MARGIN + (34 if heading else 0)
    lines = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    width = max(sum(picture.width + MARGIN for picture in line) for line in lines) + MARGIN
    sheet = Image.new("RGB", (width, top + sum(max(p.height for p in line) + MARGIN for line in lines)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((MARGIN, MARGIN - 2), _truncate(heading, _font(20), width - 2 * MARGIN), INK, _font(20))
    for number, line in enumerate(lines):
        left = MARGIN
        if number:
            draw.line((MARGIN, top - MARGIN // 2, width - MARGIN, top - MARGIN // 2), RULE)
        for picture in line:
            sheet.paste(picture, (left, top))
            left += picture.width + MARGIN
        top += max(picture.height for picture in line) + MARGIN
    return sheet


def write_sheet(path: str | Path, bands: Sequence[Band], heading: str = "", across: int = 1) -> Path:
    """Writes draw_sheet's picture to a PNG atomically. Raises UserError if the file cannot be written."""
    path = check_output(path, "sheet", (".png",))
    with atomic_write(path) as partial:
        draw_sheet(bands, heading, across).save(partial)
    return path


def _draw_band(band: Band) -> Image.Image:
    """From top to bottom: title, times, source, the reference with the notes beside it, the other rows."""
    height, width = band.rows[0][1].shape[1:3]
    num_columns = max(len(band.times), NUM_COLUMNS)
    total = LABEL_WIDTH + num_columns * (width + GAP) - GAP
    title = _wrap(band.title or "(no instruction)", _font(15), total, num_lines=2)
    top = 20 * len(title) + 22
    picture = Image.new("RGB", (total, top + (len(band.rows) + 1) * (height + GAP) - GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((0, 0), "\n".join(title), INK, _font(15), spacing=4)
    for column, time in enumerate(band.times):
        draw.text((LABEL_WIDTH + column * (width + GAP), top - 16), f"{time:.2f} s", FAINT, _font(11))
    source, *others = band.rows
    _draw_row(picture, draw, top, *source)
    top += height + GAP
    _draw_row(picture, draw, top, "reference", band.reference[None])
    left = LABEL_WIDTH + width + 3 * GAP
    notes = [line for note in band.notes for line in _wrap(note, _font(12), total - left, num_lines=2)]
    notes = notes[: max(1, height // 16)]
    draw.multiline_text((left, top + (height - 16 * len(notes)) // 2), "\n".join(notes), FAINT, _font(12), spacing=4)
    for label, cells in others:
        top += height + GAP
        _draw_row(picture, draw, top, label, cells)
    return picture


def _draw_row(picture: Image.Image, draw: ImageDraw.ImageDraw, top: int, label: str, cells: np.ndarray) -> None:
    height, width = cells.shape[1:3]
    draw.text((0, top + height // 2), label, INK, _font(13), anchor="lm")
    for column, cell in enumerate(cells):
        picture.paste(Image.fromarray(cell), (LABEL_WIDTH + column * (width + GAP), top))


def _cells(frames: Tensor, side: int) -> np.ndarray:
    """(N, H, W, 3) in 0..1 -> (N, h, w, 3) uint8, scaled so that the longer side is `side`."""
    height, width = frames.shape[1:3]
    scale = side / max(height, width)
    small = resize_and_crop(frames, (max(1, round(width * scale)), max(1, round(height * scale))))
    return (small * 255).round().to(torch.uint8).numpy()


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, num_lines: int) -> list[str]:
    """Breaks the text into at most num_lines lines; a line that is too long ends in dots."""
    words = text[:1000].split()
    lines: list[str] = []
    while words and len(lines) < num_lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_truncate(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines + ([_truncate(" ".join(words), font, width)] if words else [])


def _truncate(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
