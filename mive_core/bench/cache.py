"""The speed of `mive data cache` relative to its encoders alone: decoding, fitting and writing should overlap with the models."""

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from ..data.manifest import ManifestEntry
from ..embedded.heldout import drawn_pairs
from ..embedded.synthetic import PairedEdits
from ..media.fit import resize_and_crop
from ..media.video import write_video
from ..train.cache import CacheSettings, Encoders, cache, read_pair
from ..types import Clip
from .models import Workload, random_vae, random_vlm
from .stage import synchronized_seconds

DRAWN_SIZE = (96, 96)  # of the drawn pictures, before scaling


def bench_cache(work: Workload, *, num_pairs: int = 48, stored_size: tuple[int, int] | None = None, folder: Path | None = None) -> dict:
    """Pairs per second of the encoders alone on pairs in memory and of the whole command on video files, and the second's ratio to the first.

    The models have random weights. Each figure is the best of the workload's repeats, which are interleaved. The files hold pictures of
    `stored_size`, which the command fits to the workload's size. On a busy machine the share of processor time is the more stable
    figure: the encoders' part of the command's processor time, summed over all threads.
    """
    encoders = Encoders(random_vae(work), random_vlm(work), work.config, "random")
    settings = CacheSettings(((*work.size, work.num_frames),))
    with tempfile.TemporaryDirectory(dir=folder) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = write_clips(Path(temporary), num_pairs, stored_size or work.size, work.num_frames)
        pairs = [read_pair(entry, settings) for entry in entries]
        encoders.features(pairs[0], settings)
        alone, whole = [], []
        for repeat in tqdm(range(work.repeats), desc="repeats", disable=None):
            alone.append(wall_and_cpu_seconds(work, lambda: [encoders.features(pair, settings) for pair in pairs]))
            whole.append(wall_and_cpu_seconds(work, partial(cache, entries, encoders, Path(temporary) / f"cache{repeat}", settings)))
        reading = synchronized_seconds(work, lambda: [read_pair(entry, settings) for entry in entries])
    (alone_wall, alone_cpu), (whole_wall, whole_cpu) = (map(min, zip(*measured)) for measured in (alone, whole))
    return {
        **work.description,
        "pairs": num_pairs,
        "stored_size": list(stored_size or work.size),
        "encoders_pairs_per_second": num_pairs / alone_wall,
        "cache_pairs_per_second": num_pairs / whole_wall,
        "share": alone_wall / whole_wall,
        "share_of_processor_time": alone_cpu / whole_cpu,
        "reading_pairs_per_second": num_pairs / reading,
    }


def wall_and_cpu_seconds(work: Workload, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and its processor time in all threads."""
    before = time.process_time()
    return synchronized_seconds(work, call), time.process_time() - before


def write_clips(folder: Path, num_pairs: int, size: tuple[int, int], num_frames: int) -> list[ManifestEntry]:
    """Writes drawn pairs as video files and returns their manifest entries."""
    entries = []
    for number, (pair, _) in enumerate(drawn_pairs(PairedEdits(0, "train", DRAWN_SIZE, num_frames), num_pairs)):
        paths = [folder / f"{number}-{kind}.mp4" for kind in ("source", "target")]
        for path, frames in zip(paths, (pair.request.source.frames, pair.target)):
            write_video(path, Clip(resize_and_crop(frames, size), pair.request.source.fps))
        entries.append(ManifestEntry(paths[0], None, pair.request.instruction, paths[1]))
    return entries
