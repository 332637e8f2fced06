"""Edits two clips with the embedded models: real footage, delivered at its own size, and a drawn clip from the held-out split."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..delivery import deliver
from ..embedded.heldout import recolour_pairs
from ..embedded.synthetic import PairedEdits
from ..evaluation.contact_sheet import make_band, write_sheet
from ..evaluation.evaluate import BASELINES, EvaluationSettings, notes, region_psnr, score, summary, write_json
from ..evaluation.full_size import FullSizePairs
from ..media.fit import fit_mask, resize
from ..media.images import write_image
from ..media.paths import atomic_folder, check_output_folder
from ..media.video import read_clip, write_video
from ..pipeline import Pipeline
from ..types import Clip, PairedEdit

SAMPLE = Path(__file__).parents[1] / "assets" / "samples" / "bigbuckbunny_640x360.mp4"
DRAWN_SEED, DRAWN_INDEX = 1, 3
CELL_SIDE = 240  # pixels of a frame on the sheet


def run_demo(output_dir: str | Path, models: str = "tiny", settings: EvaluationSettings = EvaluationSettings(), command: str = "") -> dict:
    """Writes footage.mp4 and edited.mp4 (the drawn clip), the footage's source and reference, sheet.png and report.json -> the report.

    The report's figures are the model's own; `delivered` beside them is PSNR at the source's size after source detail and anchor.
    """
    output_dir = check_output_folder(output_dir, "output")
    start = time.perf_counter()
    pairs = demo_pairs()
    pipeline = Pipeline.load(models)
    seconds_to_load = time.perf_counter() - start
    rows, bands = [], []
    with atomic_folder(output_dir) as folder:
        for pair, stem in zip(pairs, ("footage", "edited")):
            row, delivered = edit_pair(pipeline, pair, settings)
            write_video(folder / f"{stem}.mp4", Clip(delivered, pair.request.source.fps))
            rows.append(row | {"video": f"{stem}.mp4"})
            bands.append(make_band(pair.request, delivered, pair.target, notes=notes(row), cell_side=CELL_SIDE))
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


def edit_pair(pipeline: Pipeline, pair: PairedEdit, settings: EvaluationSettings) -> tuple[dict, torch.Tensor]:
    """Edits a pair at the model's size -> its row of the report, and the frames delivered at the pair's own size, (F, H, W, 3)."""
    request = pair.request
    assert pair.target is not None and pair.mask is not None  # demo_pairs has both
    fitted = FullSizePairs((pair,)).fit(request, pipeline.config.edit_pixels)
    height, width = fitted.reference.shape[:2]
    target = torch.stack([resize(frame, (width, height)) for frame in pair.target])
    mask = fit_mask(pair.mask[..., None].expand(*pair.mask.shape, 3).float(), (width, height))
    small = replace(pair, request=fitted, target=target, mask=mask)
    start = time.perf_counter()
    result = pipeline.run(fitted, **settings.sampling)
    seconds = time.perf_counter() - start
    delivered = torch.stack(list(deliver(iter(request.source.frames), result.edited.frames, result.round_trip, request.reference)))
    row = {"name": pair.name, "instruction": request.instruction, **score(pipeline, small, result.edited.frames), "seconds": seconds}
    return row | {"delivered": region_psnr(delivered, pair.target, pair.mask)}, delivered


def demo_pairs() -> list[PairedEdit]:
    """Returns the footage pair and the drawn pair, with their target videos."""
    drawn = PairedEdits(DRAWN_SEED, "heldout", kinds=("seen in reference",), edits=("recolour", "replace")).sample(DRAWN_INDEX).pair
    footage, _ = next(recolour_pairs(read_clip(SAMPLE)))
    return [footage, drawn]


def peak_rss_bytes() -> int | None:
    """Returns the peak memory of this process in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
