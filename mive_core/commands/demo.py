"""Edits two clips with the embedded models: a drawn clip from the held-out split, and real footage."""

import sys
import time
from pathlib import Path

from ..embedded.heldout import footage_pairs
from ..embedded.synthetic import PairedEdits
from ..evaluation.contact_sheet import make_band, write_sheet
from ..evaluation.evaluate import BASELINES, EvaluationSettings, notes, score, summary, timed_edit, write_json
from ..media.fit import fit_clip
from ..media.paths import atomic_folder, check_output_folder
from ..media.video import read_clip, write_image, write_video
from ..pipeline import Pipeline
from ..types import PairedEdit

SAMPLE = Path(__file__).parents[1] / "assets" / "samples" / "bigbuckbunny_33f.mp4"
DRAWN_SEED, DRAWN_INDEX = 1, 3
FOOTAGE_LOOK, FOOTAGE_FRAMES = "night", 17


def run_demo(output_dir: str | Path, models: str = "tiny", settings: EvaluationSettings = EvaluationSettings(), command: str = "") -> dict:
    """Writes edited.mp4 (the drawn clip), footage.mp4, the drawn clip's source and reference, sheet.png and report.json -> the report."""
    output_dir = check_output_folder(output_dir, "output")
    start = time.perf_counter()
    pairs = demo_pairs()
    pipeline = Pipeline.load(models)
    seconds_to_load = time.perf_counter() - start
    rows, bands = [], []
    with atomic_folder(output_dir) as folder:
        for pair, stem in zip(pairs, ("edited", "footage")):
            edited, seconds = timed_edit(pipeline, pair.request, settings)
            write_video(folder / f"{stem}.mp4", edited)
            row = {
                "name": pair.name,
                "instruction": pair.request.instruction,
                "video": f"{stem}.mp4",
                **score(pipeline, pair, edited.frames),
                "seconds": seconds,
            }
            rows.append(row)
            bands.append(make_band(pair.request, edited.frames, pair.target, notes=notes(row)))
        write_video(folder / "source.mp4", pairs[0].request.source)
        write_image(folder / "reference.png", pairs[0].request.reference)
        write_sheet(folder / "sheet.png", bands)
        report = {
            **{key: value for key, value in summary(rows).items() if key not in BASELINES},
            "per_clip": rows,
            "command": command,
            "seconds_to_load": seconds_to_load,
            "seconds": time.perf_counter() - start,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        write_json(folder / "report.json", report)
    return report


def demo_pairs() -> list[PairedEdit]:
    """Returns the drawn pair and the footage pair, with their target videos."""
    drawn = PairedEdits(DRAWN_SEED, "heldout", kinds=("seen in reference",), edits=("recolour", "replace")).sample(DRAWN_INDEX).pair
    clip = fit_clip(read_clip(SAMPLE), num_frames=FOOTAGE_FRAMES)
    ((footage, _),) = footage_pairs(clip, (FOOTAGE_LOOK,))
    return [drawn, footage]


def peak_rss_bytes() -> int | None:
    """Returns the peak memory of this process in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
