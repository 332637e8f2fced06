"""How time and memory of a forward grow with frames and size, whole and in context windows, beside what the memory model says.

T latent frames. Windows are latent frames that overlap; where two overlap their results are averaged, as ComfyUI's context windows do.
"""

import gc
import math
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..config import PRESETS
from ..cost.flops import dit_flops
from ..cost.memory import activation_bytes
from ..errors import UserError
from ..media.paths import atomic_write
from ..vae import LATENT_CHANNELS, TEMPORAL_FACTOR
from .against_diffusers import timed
from .load import resident
from .memory_counter import Counted
from .models import Workload, random_dit, workload

FRAMES = (17, 33, 65, 97, 129, 177, 241)
SIZES = ((160, 96), (256, 144), (320, 192), (480, 272), (640, 352))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives every tensor back at once, so that resident memory is that of live tensors
CLEAR = Path("/proc/self/clear_refs")
PAPER, INK, FAINT, COLOURS = (250, 250, 248), (28, 28, 32), (222, 222, 218), ((200, 60, 40), (40, 90, 180))


@dataclass(frozen=True)
class Point:
    """One forward to measure; `window` latent frames at a time with `overlap` shared, or None for the whole clip."""

    preset: str
    size: tuple[int, int]  # width, height in pixels
    num_frames: int
    blocks: int | None
    window: int | None
    overlap: int
    repeats: int


def bench_growth(
    preset: str = "tiny",
    *,
    size: tuple[int, int] = (320, 192),
    frames: tuple[int, ...] = FRAMES,
    sizes: tuple[tuple[int, int], ...] = SIZES,
    blocks: int | None = None,
    window_frames: int = 33,
    overlap_frames: int = 9,
    repeats: int = 1,
) -> dict:
    """By frames at one size, whole and in windows, and by size at `window_frames` frames; fp32 on a CPU, one process for all.

    Raises UserError for unknown presets, counts that are not 4n+1, and systems that do not tell peak memory.
    """
    if not CLEAR.exists():
        raise UserError("this system does not tell a forward's peak memory", expected="Linux")
    counts = {"frames": frames, "window": (window_frames,), "overlap": (overlap_frames,)}
    wrong = [f"{name} {count}" for name, values in counts.items() for count in values if count % TEMPORAL_FACTOR != 1]
    if wrong or preset not in PRESETS or overlap_frames >= window_frames:
        raise UserError(
            "the points do not fit",
            got=", ".join(wrong) or f"{preset}, windows of {window_frames} with {overlap_frames} shared",
            expected=f"{', '.join(PRESETS)}; 4n+1 frames; an overlap shorter than the window",
        )
    latent = [(count - 1) // TEMPORAL_FACTOR + 1 for count in (window_frames, overlap_frames)]
    common = (preset, blocks, repeats)
    points = {
        "by_frames": [_point(common, size, count) for count in sorted(frames)],
        "by_frames_in_windows": [_point(common, size, count, *latent) for count in sorted(frames)],
        "by_size": [_point(common, side, window_frames) for side in sizes],
    }
    os.environ.update(MALLOC)  # the new process reads them when it starts
    with multiprocessing.get_context("spawn").Pool(1, _prepare, (torch.get_num_threads(),)) as process:
        rows = iter(tqdm(process.imap(measure_point, [point for own in points.values() for point in own]), total=sum(map(len, points.values())), desc="points"))
        tables = {name: [next(rows) for _ in own] for name, own in points.items()}
    return {
        "preset": preset,
        "blocks": blocks,
        "size": list(size),
        "window_frames": window_frames,
        "overlap_frames": overlap_frames,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **tables,
        "growth_exponent": {name: exponent(tables[name]) for name in ("by_frames", "by_frames_in_windows")},
        "largest_memory_error": max(abs(row["counted_error"]) for own in tables.values() for row in own),
        "largest_rss_error": max((abs(row["rss_error"]) for own in tables.values() for row in own if row["rss_error"] is not None), default=None),
    }


def _point(common: tuple, size: tuple[int, int], num_frames: int, window: int | None = None, overlap: int = 0) -> Point:
    preset, blocks, repeats = common
    return Point(preset, size, num_frames, blocks, window, overlap, repeats)


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    measure_point(Point("tiny", (64, 64), 5, 1, None, 0, 1))  # libraries set themselves up


@torch.inference_mode()
def measure_point(point: Point) -> dict:
    """Seconds, and bytes beside the weights: by the formula, by counted tensors, by what the process had resident at most."""
    work = workload(point.preset, size=point.size, num_frames=point.num_frames, blocks=point.blocks, repeats=point.repeats)
    model = random_dit(work)
    num_windows, call = forward(model, work, point)
    gc.collect()
    before = resident("VmRSS")
    CLEAR.write_text("5")  # the kernel's mark of the highest falls to what is resident now
    call()
    rss = max(resident("VmHWM") - before, 0)  # 0: what the process held already was enough, so nothing can be told
    seconds, spent = (statistics.median(found) for found in zip(*(_timed(call) for _ in range(point.repeats))))
    with Counted() as counted:
        call()
    one = Workload(work.config, work.size, TEMPORAL_FACTOR * (point.window - 1) + 1, work.device, work.dtype) if num_windows > 1 else work
    # beside the sequence: about one velocity, and in windows the sum of them over the whole clip
    latents = [LATENT_CHANNELS * math.prod(part.cells) * 4 for part in (one, work)]
    predicted = activation_bytes(work.config, one.layout.num_tokens, 4) + latents[0] + (latents[1] if num_windows > 1 else 0)
    return {
        "frames": point.num_frames,
        "size": list(point.size),
        "tokens": work.layout.num_tokens,
        "windows": num_windows,
        "seconds": seconds,
        "processor_seconds": spent,
        "flops": num_windows * dit_flops(one.config, one.layout),
        "predicted_bytes": predicted,
        "counted_bytes": counted.peak,
        "rss_bytes": rss,
        "counted_error": predicted / counted.peak - 1,
        "rss_error": predicted / rss - 1 if rss > 0 else None,
    }


def _timed(call) -> tuple[float, float]:
    """Seconds by the clock, and of this process's work alone, which others on the machine disturb less."""
    begun = time.process_time()
    return timed(call), time.process_time() - begun


def forward(model, work: Workload, point: Point):
    """-> how many windows, and a call that makes one velocity (1, C, T, Y, X) of them."""
    (frames, rows, columns), layout = work.grid, work.layout
    noisy, source = torch.randn(2, 1, LATENT_CHANNELS, *work.cells).unbind()
    one = layout.num_condition if point.window is None else max((point.window + 1) * rows * columns // 19, 1)
    states, t = torch.randn(1, len(work.config.layers), one, work.config.vlm_width), torch.tensor([0.5])
    spans = [(0, frames)] if point.window is None else windows(frames, point.window, point.overlap)

    def velocity(first: int, last: int) -> Tensor:
        return model(noisy[:, :, first:last], source[:, :, first:last], source[:, :, :1], model.embed_condition(states), t)

    def joined() -> Tensor:
        if len(spans) == 1:
            return velocity(*spans[0])
        total, count = torch.zeros_like(noisy), torch.zeros(frames, 1, 1)
        for first, last in spans:
            total[:, :, first:last] += velocity(first, last)
            count[first:last] += 1
        return total.div_(count)

    return len(spans), joined


def windows(num_frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """Spans that cover 0..T in steps of length - overlap; the last ends with the clip."""
    if num_frames <= length:
        return [(0, num_frames)]
    starts = [*range(0, num_frames - length, length - overlap), num_frames - length]
    return [(start, start + length) for start in starts]


def exponent(rows: list[dict]) -> float | None:
    """Of time by frames, from the longer half of the clips: 1 is linear, 2 quadratic."""
    longer = rows[len(rows) // 2 :]
    if len(longer) < 2:
        return None
    x, y = ([math.log(row[key]) for row in longer] for key in ("frames", "processor_seconds"))
    return statistics.linear_regression(x, y).slope


def draw_growth(report: dict) -> Image.Image:
    """Seconds of one processor and memory by frames, whole and in windows."""
    picture = Image.new("RGB", (920, 380), PAPER)
    lines = {"whole": report["by_frames"], f"in windows of {report['window_frames']}": report["by_frames_in_windows"]}
    for left, key, unit, title in (
        (0, "processor_seconds", 1.0, "seconds a forward"),
        (460, "rss_bytes", 2**20, "MB beside the weights; dots: by the formula"),
    ):
        _draw_panel(picture, left, lines, key, unit, title)
    return picture


def _draw_panel(picture: Image.Image, left: int, lines: dict[str, list[dict]], key: str, unit: float, title: str) -> None:
    draw, small = ImageDraw.Draw(picture), ImageFont.load_default(13)
    x0, y0, x1, y1 = left + 60, 340, left + 440, 50
    most = max(row[shown] / unit for rows in lines.values() for row in rows for shown in (key, "predicted_bytes")[: 1 + (key == "rss_bytes")])
    longest = max(row["frames"] for rows in lines.values() for row in rows)

    def place(frames: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * frames / longest, y0 + (y1 - y0) * value / most

    draw.text((x0, 14), title, INK, ImageFont.load_default(15))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = place(0, most * share)[1]
        draw.line((x0, y, x1, y), FAINT)
        draw.text((x0 - 6, y), f"{most * share:.3g}", INK, small, anchor="rm")
        draw.text((place(longest * share, 0)[0], y0 + 6), f"{longest * share:.0f}", INK, small, anchor="mt")
    draw.text((x1, y0 + 22), "frames", INK, small, anchor="rt")
    for number, ((name, rows), colour) in enumerate(zip(lines.items(), COLOURS)):
        draw.line([place(row["frames"], row[key] / unit) for row in rows], colour, 2)
        draw.text((x0 + 10, y1 + 6 + 18 * number), name, colour, small)
        for row in rows if key == "rss_bytes" else ():
            x, y = place(row["frames"], row["predicted_bytes"] / unit)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


def write_growth(path: Path, report: dict) -> None:
    """The plot as a PNG."""
    with atomic_write(path) as partial:
        draw_growth(report).save(partial, "PNG", optimize=True)
