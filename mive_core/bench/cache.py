"""How much of the encoders' own speed `mive data cache` keeps: decoding, fitting and writing are to hide behind the models."""

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from ..data.manifest import ManifestEntry
from ..embedded.heldout import drawn_pairs
from ..embedded.synthetic import PairedEdits
from ..media.fit import cover
from ..media.video import write_video
from ..train.cache import CacheSettings, Encoders, cache, read_pair
from ..types import Clip
from .models import Workload, random_vae, random_vlm
from .stage import timed_once

DRAWN = (96, 96)  # of the pictures, before they are scaled


def bench_cache(work: Workload, *, num_pairs: int = 48, stored_size: tuple[int, int] | None = None, folder: Path | None = None) -> dict:
    """Pairs a second of the encoders alone on pairs in memory, of the whole command on video files, and the second's share of the first.

    The models are of random weights. Each figure is the best of the workload's repeats, which take turns. The files hold pictures of
    `stored_size`, which the command fits to the workload's size. On a machine that does other work besides, the share of processor time
    is the steadier figure: what the command costs beside its encoders, all threads counted.
    """
    encoders = Encoders(random_vae(work), random_vlm(work), work.config, "random")
    settings = CacheSettings(((*work.size, work.num_frames),))
    with tempfile.TemporaryDirectory(dir=folder) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entries = write_clips(Path(place), num_pairs, stored_size or work.size, work.num_frames)
        pairs = [read_pair(entry, settings) for entry in entries]
        encoders.features(pairs[0], settings)
        alone, whole = [], []
        for repeat in tqdm(range(work.repeats), desc="repeats", disable=None):
            alone.append(clocks(work, lambda: [encoders.features(pair, settings) for pair in pairs]))
            whole.append(clocks(work, lambda folder=Path(place) / f"cache{repeat}": cache(entries, encoders, folder, settings)))
        reading = timed_once(work, lambda: [read_pair(entry, settings) for entry in entries])
    (alone_wall, alone_cpu), (whole_wall, whole_cpu) = (map(min, zip(*found)) for found in (alone, whole))
    return {
        **work.describes,
        "pairs": num_pairs,
        "stored_size": list(stored_size or work.size),
        "encoders_pairs_per_second": num_pairs / alone_wall,
        "cache_pairs_per_second": num_pairs / whole_wall,
        "share": alone_wall / whole_wall,
        "share_of_processor_time": alone_cpu / whole_cpu,
        "reading_pairs_per_second": num_pairs / reading,
    }


def clocks(work: Workload, call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a call, and seconds of processor time in all threads."""
    before = time.process_time()
    return timed_once(work, call), time.process_time() - before


def write_clips(folder: Path, num_pairs: int, size: tuple[int, int], num_frames: int) -> list[ManifestEntry]:
    """Drawn pairs as video files, and their entries."""
    entries = []
    for number, (pair, _) in enumerate(drawn_pairs(PairedEdits(0, "train", DRAWN, num_frames), num_pairs)):
        paths = [folder / f"{number}-{kind}.mp4" for kind in ("source", "target")]
        for path, frames in zip(paths, (pair.request.source.frames, pair.target)):
            write_video(path, Clip(cover(frames, size), pair.request.source.fps))
        entries.append(ManifestEntry(paths[0], None, pair.request.instruction, paths[1]))
    return entries
