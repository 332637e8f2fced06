"""Growth of a forward pass's time and memory with frames and size, whole and in context windows, compared with the memory formula.

T latent frames. Context windows are overlapping spans of latent frames; overlapping results are averaged, as in ComfyUI.
"""

import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ..config import PRESETS, TEMPORAL_FACTOR, latent_grid
from ..cost.flops import dit_flops
from ..cost.memory import activation_bytes
from ..dit import MiVEDiT
from ..errors import UserError
from ..media.paths import atomic_write
from ..vae import LATENT_CHANNELS
from .against_diffusers import timed
from .load import resident
from .memory_counter import MemoryCounter
from .models import Workload, random_dit, workload

FRAMES = (17, 33, 65, 97, 129, 177, 241)
SIZES = ((160, 96), (256, 144), (320, 192), (480, 272), (640, 352))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc returns freed tensors at once, so that resident memory is that of live tensors
Made = TypeVar("Made")
CLEAR_REFS = Path("/proc/self/clear_refs")
PAPER, INK, FAINT, COLOURS = (250, 250, 248), (28, 28, 32), (222, 222, 218), ((200, 60, 40), (40, 90, 180))


@dataclass(frozen=True)
class Point:
    """One measurement: windows of `window` latent frames, of which `overlap` are shared; window None: the whole clip at once."""

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
    """Measures by frames at one size, whole and in windows, and by size at `window_frames` frames; fp32 on a CPU, in a single process.

    Raises UserError for unknown presets, frame counts that are not 4n+1, and systems that do not report peak memory.
    """
    if not CLEAR_REFS.exists():
        raise UserError("this system does not tell a forward's peak memory", expected="Linux")
    counts = {"frames": frames, "window": (window_frames,), "overlap": (overlap_frames,)}
    wrong = [f"{name} {count}" for name, values in counts.items() for count in values if count % TEMPORAL_FACTOR != 1]
    if wrong or preset not in PRESETS or overlap_frames >= window_frames:
        raise UserError(
            "the points do not fit",
            got=", ".join(wrong) or f"{preset}, windows of {window_frames} with {overlap_frames} shared",
            expected=f"{', '.join(PRESETS)}; 4n+1 frames; an overlap shorter than the window",
        )
    latent = [latent_grid(count, 0, 0)[0] for count in (window_frames, overlap_frames)]
    common = (preset, blocks, repeats)
    points = {
        "by_frames": [_point(common, size, count) for count in sorted(frames)],
        "by_frames_in_windows": [_point(common, size, count, *latent) for count in sorted(frames)],
        "by_size": [_point(common, side, window_frames) for side in sizes],
    }
    os.environ.update(MALLOC)  # read by the new process when it starts
    with multiprocessing.get_context("spawn").Pool(1, _init_worker, (torch.get_num_threads(),)) as process:
        rows = iter(
            tqdm(process.imap(measure_point, [point for group in points.values() for point in group]), total=sum(map(len, points.values())), desc="points")
        )
        tables = {name: [next(rows) for _ in group] for name, group in points.items()}
    return {
        "preset": preset,
        "blocks": blocks,
        "size": list(size),
        "window_frames": window_frames,
        "overlap_frames": overlap_frames,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **tables,
        "growth_exponent": {name: growth_exponent(tables[name]) for name in ("by_frames", "by_frames_in_windows")},
        "largest_memory_error": max(abs(row["counted_error"]) for table in tables.values() for row in table),
        "largest_rss_error": max((abs(row["rss_error"]) for table in tables.values() for row in table if row["rss_error"] is not None), default=None),
    }


def _point(common: tuple, size: tuple[int, int], num_frames: int, window: int | None = None, overlap: int = 0) -> Point:
    preset, blocks, repeats = common
    return Point(preset, size, num_frames, blocks, window, overlap, repeats)


def _init_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    measure_point(Point("tiny", (64, 64), 5, 1, None, 0, 1))  # warms up the libraries


def peak_growth(call: Callable[[], Made]) -> tuple[Made, int]:
    """Returns what call() returns, and by how many bytes this process's resident memory rose at its peak; 0: it did not grow (Linux)."""
    before = resident("VmRSS")
    CLEAR_REFS.write_text("5")  # resets the kernel's peak to what is resident now
    made = call()
    return made, max(resident("VmHWM") - before, 0)


@torch.inference_mode()
def measure_point(point: Point) -> dict:
    """Measures seconds, and bytes without the weights: by the formula, by counted tensors, and by the process's peak resident memory."""
    work = workload(point.preset, size=point.size, num_frames=point.num_frames, blocks=point.blocks, repeats=point.repeats)
    model = random_dit(work)
    num_windows, call = make_windowed_forward(model, work, point)
    gc.collect()
    rss = peak_growth(call)[1]  # 0: there is no measurement
    seconds, processor_seconds = (statistics.median(values) for values in zip(*(_timed(call) for _ in range(point.repeats))))
    with MemoryCounter() as counter:
        call()
    window = work
    if point.window is not None and num_windows > 1:
        window = Workload(work.config, work.size, TEMPORAL_FACTOR * (point.window - 1) + 1, work.device, work.dtype)
    # besides the sequence: about one velocity, and with windows their sum over the whole clip
    latents = [LATENT_CHANNELS * math.prod(part.latent_grid) * 4 for part in (window, work)]
    predicted = activation_bytes(work.config, window.layout.num_tokens, 4) + latents[0] + (latents[1] if num_windows > 1 else 0)
    return {
        "frames": point.num_frames,
        "size": list(point.size),
        "tokens": work.layout.num_tokens,
        "windows": num_windows,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "flops": num_windows * dit_flops(window.config, window.layout),
        "predicted_bytes": predicted,
        "counted_bytes": counter.peak,
        "rss_bytes": rss,
        "counted_error": predicted / counter.peak - 1,
        "rss_error": predicted / rss - 1 if rss > 0 else None,
    }


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds, and this process's processor seconds, which other processes disturb less."""
    start = time.process_time()
    return timed(call), time.process_time() - start


def make_windowed_forward(model: MiVEDiT, work: Workload, point: Point) -> tuple[int, Callable[[], Tensor]]:
    """Returns the number of windows, and a call that computes one velocity (1, C, T, Y, X) from them."""
    (frames, rows, columns), layout = work.grid, work.layout
    noisy, source = torch.randn(2, 1, LATENT_CHANNELS, *work.latent_grid).unbind()
    num_condition = layout.num_condition if point.window is None else max((point.window + 1) * rows * columns // 19, 1)
    states, t = torch.randn(1, len(work.config.layers), num_condition, work.config.vlm_width), torch.tensor([0.5])
    spans = [(0, frames)] if point.window is None else context_windows(frames, point.window, point.overlap)

    def velocity(first: int, last: int) -> Tensor:
        return model(noisy[:, :, first:last], source[:, :, first:last], source[:, :, :1], model.embed_condition(states), t)

    def averaged() -> Tensor:
        if len(spans) == 1:
            return velocity(*spans[0])
        total, count = torch.zeros_like(noisy), torch.zeros(frames, 1, 1)
        for first, last in spans:
            total[:, :, first:last] += velocity(first, last)
            count[first:last] += 1
        return total.div_(count)

    return len(spans), averaged


def context_windows(num_frames: int, length: int, overlap: int) -> list[tuple[int, int]]:
    """Spans that cover 0..T in steps of length - overlap; the last one ends with the clip."""
    if num_frames <= length:
        return [(0, num_frames)]
    starts = [*range(0, num_frames - length, length - overlap), num_frames - length]
    return [(start, start + length) for start in starts]


def growth_exponent(rows: list[dict]) -> float | None:
    """The exponent of time over frames, fitted to the longer half of the clips: 1 is linear, 2 quadratic."""
    longer = rows[len(rows) // 2 :]
    if len(longer) < 2:
        return None
    x, y = ([math.log(row[key]) for row in longer] for key in ("frames", "processor_seconds"))
    return statistics.linear_regression(x, y).slope


def draw_growth(report: dict) -> Image.Image:
    """Plots processor seconds and memory over frames, whole and in windows."""
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
    maximum = max(row[shown] / unit for rows in lines.values() for row in rows for shown in (key, "predicted_bytes")[: 1 + (key == "rss_bytes")])
    longest = max(row["frames"] for rows in lines.values() for row in rows)

    def to_pixel(frames: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * frames / longest, y0 + (y1 - y0) * value / maximum

    draw.text((x0, 14), title, INK, ImageFont.load_default(15))
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = to_pixel(0, maximum * share)[1]
        draw.line((x0, y, x1, y), FAINT)
        draw.text((x0 - 6, y), f"{maximum * share:.3g}", INK, small, anchor="rm")
        draw.text((to_pixel(longest * share, 0)[0], y0 + 6), f"{longest * share:.0f}", INK, small, anchor="mt")
    draw.text((x1, y0 + 22), "frames", INK, small, anchor="rt")
    for number, ((name, rows), colour) in enumerate(zip(lines.items(), COLOURS)):
        draw.line([to_pixel(row["frames"], row[key] / unit) for row in rows], colour, 2)
        draw.text((x0 + 10, y1 + 6 + 18 * number), name, colour, small)
        for row in rows if key == "rss_bytes" else ():
            x, y = to_pixel(row["frames"], row["predicted_bytes"] / unit)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


def write_growth(path: Path, report: dict) -> None:
    """Writes the plot as a PNG."""
    with atomic_write(path) as partial:
        draw_growth(report).save(partial, "PNG", optimize=True)
