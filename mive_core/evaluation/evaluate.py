"""How good edits are: PSNR against known outcomes, beside what copying or a perfect DiT would reach.

F frames, H x W pixels. PSNR is over all frames and channels of a clip at once, peak 1; figures of a
set are means over its clips. Where nothing differs PSNR_CAP stands for infinity. `edit_completion` says in
place of a person whether the edit is there in every frame; `success_rate` counts the clips where it is, and `object_match` those where
the edited thing has the truth's colour, place and shape.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..errors import UserError
from ..media.paths import atomic_folder, atomic_write, check_output_folder
from ..media.video import write_video
from ..types import Clip, EditRequest, PairedEdit
from .contact_sheet import Band, make_band, write_sheet
from .object_match import match_object

PSNR_CAP = 100.0
REFERENCE_MODES = ("given", "source_frame")
INSTRUCTION_MODES = ("given", "wrong", "empty")
FIGURES = ("psnr_edited", "psnr_kept", "psnr")  # in the mask, outside of it, of whole frames
BASELINES = ("vae_ceiling", "copy_source", "repeat_reference")
SHEET_ACROSS, PAGE_CLIPS = 4, 8
VISIBLE = 0.15  # distance in RGB, of sqrt(3) at most, from which a pixel counts as changed by the edit
MIN_CHANGED = 0.01  # of a frame's pixels: where fewer change, the frame does not count
SUCCESS_THRESHOLD = 0.75  # edit_completion from which a clip counts as right


@dataclass(frozen=True)
class EvaluationSettings:
    """How the pipeline is run; None is the checkpoint's own setting."""

    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    seed: int = 0
    reference_mode: str = "given"  # source_frame: the unedited first frame stands in for the reference
    instruction_mode: str = "given"  # wrong: another clip's instruction; empty: none

    def __post_init__(self):
        for what, got, known in (("reference_mode", self.reference_mode, REFERENCE_MODES), ("instruction_mode", self.instruction_mode, INSTRUCTION_MODES)):
            if got not in known:
                raise UserError("unknown mode", where=what, got=repr(got), expected=" or ".join(known))


class Editor(Protocol):
    """What is measured: a Pipeline, or anything that edits and has a VAE to name a ceiling."""

    config: MiVEConfig

    @property
    def vae(self): ...

    def edit(self, request: EditRequest, *, steps, cfg, shift, seed, progress) -> Clip: ...


def evaluate(
    pipeline: Editor,
    pairs: Sequence[PairedEdit],
    output_dir: str | Path,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    command: str = "",
) -> dict:
    """Edits every pair, writes report.json, sheet.png, sheets/ (8 clips a page) and edited/ (videos) -> the report.

    `groups` names each pair's kind, edit, ... for the report's `by_kind`, `by_edit`, ...; `command` is what a reader runs to get this report.
    Nothing is written before all clips are done. Raises UserError for no pairs and for unusable ones.
    """
    output_dir, groups = check_output_folder(output_dir, "output"), groups or {}
    if not len(pairs):
        raise UserError("there is nothing to evaluate", got="0 pairs")
    rows, bands = [], []
    with atomic_folder(output_dir) as folder:
        (folder / "edited").mkdir()
        for index in tqdm(range(len(pairs)), desc="clips", disable=None):
            pair = pairs[index]
            request = asked(pair.request, settings, pairs, index)
            edited, seconds = timed_edit(pipeline, request, settings)
            write_video(folder / "edited" / f"{index:03d}.mp4", edited)
            row = {
                "name": pair.name,
                **{group: names[index] for group, names in groups.items()},
                "instruction": request.instruction,
                "seed": settings.seed,
                **score(pipeline, pair, edited.frames),
                "seconds": seconds,
            }
            rows.append(row)
            bands.append(make_band(request, edited.frames, pair.target, notes=notes(row), cell_side=96))
        report = {
            **summary(rows),
            **{f"by_{group}": by_group(rows, group) for group in groups},
            "command": command,
            "settings": asdict(settings),
            "psnr_cap": PSNR_CAP,
            "config": asdict(pipeline.config),
            "per_clip": rows,
        }
        write_json(folder / "report.json", report)
        _write_sheets(folder, bands, report)
    return report


def asked(request: EditRequest, settings: EvaluationSettings, pairs: Sequence[PairedEdit], index: int) -> EditRequest:
    """The request of pairs[index] as the settings bend it."""
    if settings.reference_mode == "source_frame":
        request = replace(request, reference=request.source.frames[0])
    if settings.instruction_mode == "empty":
        return replace(request, instruction="")
    if settings.instruction_mode == "wrong":
        return replace(request, instruction=wrong_instruction(request.instruction, pairs, index))
    return request


def wrong_instruction(own: str, pairs: Sequence[PairedEdit], index: int) -> str:
    """The instruction of the first clip, from half the set further on, that says something else. Raises UserError."""
    count = len(pairs)
    for step in range(count):
        other = pairs[(index + count // 2 + step) % count].request.instruction
        if other != own:
            return other
    raise UserError("no wrong instruction to be had", where="instruction_mode", got="clips that all ask for the same")


def timed_edit(pipeline: Editor, request: EditRequest, settings: EvaluationSettings) -> tuple[Clip, float]:
    """The edited clip and the seconds it took."""
    start = time.perf_counter()
    edited = pipeline.edit(
        request,
        steps=settings.steps,
        cfg=settings.cfg,
        shift=settings.shift,
        seed=settings.seed,
        progress=lambda steps: tqdm(steps, desc="steps", leave=False, disable=None),
    )
    return edited, time.perf_counter() - start


@torch.inference_mode()
def score(pipeline: Editor, pair: PairedEdit, edited: Tensor) -> dict:
    """Figures of one clip, edited (F, H, W, 3), and of the baselines; None where there is no truth or no such region."""
    if pair.target is None:
        nothing = dict.fromkeys(FIGURES)
        return {
            "edited_fraction": None,
            "edit_completion": None,
            "edit_completion_ceiling": None,
            "object_match": None,
            "object_match_ceiling": None,
            **nothing,
            **dict.fromkeys(BASELINES, nothing),
        }
    source, target = pair.request.source.frames, pair.target
    mask = torch.ones(target.shape[:3], dtype=torch.bool) if pair.mask is None else pair.mask
    outcomes = {
        "vae_ceiling": pipeline.vae.decode(pipeline.vae.encode(target)),
        "copy_source": source,
        "repeat_reference": pair.request.reference.expand_as(target),
    }
    done = {"edit_completion": edit_completion(edited, source, target), "edit_completion_ceiling": edit_completion(outcomes["vae_ceiling"], source, target)}
    for name, frames in (("object_match", edited), ("object_match_ceiling", outcomes["vae_ceiling"])):
        found = match_object(frames, source, target, mask, pair.colour)
        done[name] = {"matches": found.matches, **asdict(found)}
    return {
        "edited_fraction": mask.float().mean().item(),
        **done,
        **region_psnr(edited, target, mask),
        **{name: region_psnr(frames, target, mask) for name, frames in outcomes.items()},
    }


def edit_completion(frames: Tensor, source: Tensor, target: Tensor) -> float | None:
    """(F, H, W, 3) thrice -> of the pixels that the edit visibly changes, the share that lies nearer to the target than half of
    the way to the source, in the frame where it is smallest; None where the edit changes next to nothing."""
    change, error = ((target - other).norm(dim=-1).flatten(1) for other in (source, frames))
    changed = change > VISIBLE
    counts = changed.sum(dim=1)
    seen = counts >= MIN_CHANGED * changed.shape[1]
    if not seen.any():
        return None
    return (((error < change / 2) & changed).sum(dim=1)[seen] / counts[seen]).min().item()


def region_psnr(frames: Tensor, target: Tensor, mask: Tensor) -> dict[str, float | None]:
    """(F, H, W, 3) twice, (F, H, W) bool -> PSNR inside the mask, outside and over all; None for an empty region."""
    return dict(zip(FIGURES, (psnr(frames, target, region) for region in (mask, ~mask, torch.ones_like(mask)))))


def psnr(frames: Tensor, target: Tensor, region: Tensor) -> float | None:
    """(F, H, W, 3) twice in 0..1, (F, H, W) bool -> dB over the region, at most PSNR_CAP; None where it is empty or not finite."""
    if not region.any():
        return None
    error = (frames - target)[region].double().square().mean().item()
    if not math.isfinite(error):
        return None
    return min(PSNR_CAP, -10 * math.log10(error)) if error else PSNR_CAP


def summary(rows: Sequence[dict]) -> dict:
    """Means over the clips that have a figure, and how many those are."""
    means = {
        "clips": len(rows),
        "clips_with_target": sum(row["psnr_edited"] is not None or row["psnr_kept"] is not None for row in rows),
        "clips_with_kept": sum(row["psnr_kept"] is not None for row in rows),
    }
    for key in FIGURES:
        means[key] = mean([row[key] for row in rows])
    for key, done in (("success_rate", "edit_completion"), ("success_rate_ceiling", "edit_completion_ceiling")):
        means[key] = mean([None if row[done] is None else float(row[done] >= SUCCESS_THRESHOLD) for row in rows])
    for name in ("object_match", "object_match_ceiling"):
        means[name] = mean([None if row[name] is None else float(row[name]["matches"]) for row in rows])
    for name in BASELINES:
        means[name] = {key: mean([row[name][key] for row in rows]) for key in FIGURES}
    return means | {"seconds_per_clip": mean([row["seconds"] for row in rows])}


def by_group(rows: Sequence[dict], group: str) -> dict[str, dict]:
    """The summary of the clips of each name."""
    return {name: summary([row for row in rows if row[group] == name]) for name in sorted({row[group] for row in rows} - {""})}


def mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def notes(row: dict) -> tuple[str, ...]:
    """What stands beside the reference on a sheet."""
    lines = [" · ".join(text for text in (row["name"], row.get("kind"), row.get("edit")) if text)]
    if row["psnr_edited"] is not None:
        right = "" if row["edit_completion"] is None else "right, " if row["edit_completion"] >= SUCCESS_THRESHOLD else "not right, "
        lines.append(
            f"{right}edited {row['psnr_edited']:.1f} dB (copy {_db(row['copy_source']['psnr_edited'])}, ceiling {_db(row['vae_ceiling']['psnr_edited'])})"
        )
    if row["psnr_kept"] is not None:
        lines.append(f"kept {row['psnr_kept']:.1f} dB (repeat {_db(row['repeat_reference']['psnr_kept'])}, ceiling {_db(row['vae_ceiling']['psnr_kept'])})")
    return tuple(line for line in lines if line)


def write_json(path: Path, values: dict) -> None:
    """Complete or not at all; NaN is refused rather than written."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_sheets(folder: Path, bands: Sequence[Band], report: dict) -> None:
    heading = f"{report['clips']} clips · edited {_db(report['psnr_edited'])} dB · kept {_db(report['psnr_kept'])} dB"
    write_sheet(folder / "sheet.png", bands, heading, across=min(SHEET_ACROSS, math.ceil(len(bands) / 2)))
    if len(bands) > PAGE_CLIPS:
        (folder / "sheets").mkdir()
        for page, start in enumerate(range(0, len(bands), PAGE_CLIPS)):
            write_sheet(folder / "sheets" / f"{page:02d}.png", bands[start : start + PAGE_CLIPS], across=2)


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
