"""How time and memory of an edit from file to file grow with the length of the clip.

The embedded models edit a clip of the samples, played forwards and backwards to the length. Each length is measured in a process of its own.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import TEMPORAL_FACTOR
from ..data.edit_file import FileOptions, edit_file, prepare
from ..data.manifest import ManifestEntry
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings
from ..media.fit import resize
from ..media.images import write_image
from ..media.video import read_clip, write_stream
from ..pipeline import Pipeline
from .growth import CLEAR_REFS, MALLOC, peak_growth

SAMPLE = Path(__file__).parents[1] / "assets" / "samples" / "bigbuckbunny_640x360.mp4"
FRAMES = (33, 81, 161, 321)
INSTRUCTION = "make it darker"


def bench_length(size: tuple[int, int] = (640, 360), edit: tuple[int, int] = (160, 96), frames: Sequence[int] = FRAMES, steps: int | None = None) -> dict:
    """Measures clips of so many frames of `size`, edited at `edit` (width, height) -> seconds, and peak bytes beyond the loaded models, by length.

    Raises UserError for lengths that are not 4n+1, fewer than two, and systems that do not report peak memory.
    """
    if wrong := [count for count in frames if count % TEMPORAL_FACTOR != 1]:
        raise UserError("the length does not fit", got=wrong[0], expected="4n+1 frames")
    lengths = sorted(set(frames))
    if len(lengths) < 2:
        raise UserError("growth needs two lengths", got=len(lengths), fix="name another")
    if not CLEAR_REFS.exists():
        raise UserError("this system does not tell a process's peak memory", expected="Linux")
    os.environ.update(MALLOC)  # read by the new processes when they start
    rows = []
    for count in tqdm(lengths, desc="lengths", disable=None):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            rows.append(process.apply(measure_length, (size, edit, count, steps, torch.get_num_threads())))
    shorter, longest = rows[-2:]  # encoders hold some dozens of frames back, so short clips grow faster
    return {
        "size": list(size),
        "edit_size": list(edit),
        "threads": torch.get_num_threads(),
        "lengths": rows,
        "bytes_per_frame": (longest["peak_bytes"] - shorter["peak_bytes"]) / (longest["frames"] - shorter["frames"]),
        "source_bytes_per_frame": 3 * 4 * edit[0] * edit[1],
        "clip_bytes_per_frame": 3 * 4 * size[0] * size[1],
    }


def measure_length(size: tuple[int, int], edit: tuple[int, int], num_frames: int, steps: int | None, threads: int) -> dict:
    """Edits one clip. To be called in a process of its own, whose peak memory is read."""
    torch.set_num_threads(threads)
    pipeline = Pipeline.load("tiny")
    with tempfile.TemporaryDirectory() as temporary:
        source, reference = Path(temporary) / "source.mp4", Path(temporary) / "reference.png"
        sample = [resize(frame, size) for frame in read_clip(SAMPLE, what="sample").frames]
        write_stream(source, islice(cycle(sample + sample[-2:0:-1]), num_frames), size, 25.0)
        write_image(reference, 0.6 * sample[0])
        del sample
        settings, options = EvaluationSettings(steps=steps), FileOptions(size=edit)
        entry = ManifestEntry(source=source, instruction=INSTRUCTION, reference=reference)

        def edit_clip() -> None:
            edit_file(pipeline, prepare(entry, pipeline.config, options), Path(temporary) / "edited.mp4", settings, options)

        start = time.perf_counter()
        _, peak = peak_growth(edit_clip)
        return {"frames": num_frames, "seconds": time.perf_counter() - start, "peak_bytes": peak}
