"""Evaluates edits: PSNR against the ground truth, compared with copying an input and with a perfect DiT.

F frames, H x W pixels. PSNR covers all frames and channels of a clip at once, with a peak of 1; the figures of a set are means over its
clips. PSNR_CAP replaces infinity where nothing differs. `edit_completion` measures, without a human rater, whether the edit is present
in every frame. `success_rate` is the share of clips where it is, and `object_match` the share where the edited object has the truth's
colour, position and shape, of the clips with an object of one colour. `quality` holds what needs neither weights nor, but for SSIM, a known
result. What is not measured is None.

These figures are those of the model's own pixels, at its own size. `delivered` holds the PSNR of what `mive edit` writes: frames of the
source's size, with the source's detail.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import MiVEConfig
from ..delivery import deliver
from ..errors import UserError
from ..media.paths import atomic_folder, atomic_write, check_output_folder
from ..media.video import write_video
from ..types import Clip, EditRequest, EditResult, PairedEdit
from .before import EDITED, REPORT, Before, decibels
from .contact_sheet import Band, make_band, write_sheet
from .full_size import FullSizePairs, colour_match, flow_reference, same_request
from .metrics import FIGURES, PSNR_CAP, edit_completion, first_frame_gap, is_nearest, mean, region_psnr, shows_edit, worst_frame
from .object_match import match_object, mean_colour_distance
from .quality import QUALITY, quality

REFERENCE_MODES = ("given", "source_frame")
INSTRUCTION_MODES = ("given", "wrong", "empty")
COMPLETION = tuple(f"{name}{suffix}" for suffix in ("", "_ceiling") for name in ("edit_completion", "object_match", "mean_colour_distance"))
BASELINES = ("vae_ceiling", "copy_source", "repeat_reference")
FULL_SIZE_BASELINES = {"colour_match": colour_match, "flow_reference": flow_reference}
DELIVERY_FIGURES = ("delivered", "round_trip", *FULL_SIZE_BASELINES)  # round_trip: the source through the VAE, at the model's size
LOOK_STRENGTHS = "look strengths"  # kind of the clips that show one look, named by their edit, in several strengths
SHEET_ACROSS, PAGE_CLIPS = 4, 8
SUCCESS_THRESHOLD = 0.75  # edit_completion from which a clip counts as a success
CLOSE_GAP = 1.0  # dB; largest first_frame_gap of a first frame that follows the reference
WORST_FRAME = ("psnr_worst_frame", "psnr_worst_frame_ceiling", "worst_frame_gap")  # over the clip's frames, inside the mask


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of the pipeline; None: the checkpoint's default."""

    steps: int | None = None
    cfg: float | None = None
    shift: float | None = None
    seed: int = 0
    reference_mode: str = "given"  # source_frame: the unedited first frame replaces the reference
    instruction_mode: str = "given"  # wrong: another clip's instruction; empty: none

    @property
    def sampling(self) -> dict:
        """The settings that Pipeline.edit and Pipeline.run take."""
        return {"steps": self.steps, "cfg": self.cfg, "shift": self.shift, "seed": self.seed}

    def __post_init__(self):
        for what, got, known in (("reference_mode", self.reference_mode, REFERENCE_MODES), ("instruction_mode", self.instruction_mode, INSTRUCTION_MODES)):
            if got not in known:
                raise UserError("unknown mode", where=what, got=repr(got), expected=" or ".join(known))


class Editor(Protocol):
    """A Pipeline, or any other editor with a VAE, which gives the ceiling."""

    @property
    def config(self) -> MiVEConfig: ...

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
    full_size: FullSizePairs | None = None,
    before: Before | None = None,
    command: str = "",
) -> dict:
    """Edits every pair, writes report.json, sheet.png, sheets/ (8 clips per page) and edited/ (videos), and returns the report.

    `groups` holds each pair's kind, edit, ... for the report's `by_kind`, `by_edit`, ...; `full_size` the same pairs at their sources' own
    sizes, for DELIVERY_FIGURES and `strength_right`; `before` is an earlier evaluation of the same pairs to compare with; `command` is the
    command that reproduces the report. Nothing is written before all clips are finished. Raises UserError if there are no pairs or a pair
    is unusable.
    """
    output_dir, groups = check_output_folder(output_dir, "output"), groups or {}
    if not len(pairs):
        raise UserError("there is nothing to evaluate", got="0 pairs")
    rows: list[dict] = []
    bands: list[Band] = []
    with atomic_folder(output_dir) as folder:
        (folder / EDITED).mkdir()
        for index in tqdm(range(len(pairs)), desc="clips", disable=None):
            pair = pairs[index]
            request = apply_modes(pair.request, settings, pairs, index)
            edited, seconds = timed_edit(pipeline, request, settings)
            write_video(folder / EDITED / f"{index:03d}.mp4", edited)
            row = {
                "name": pair.name,
                **{group: names[index] for group, names in groups.items()},
                "instruction": request.instruction,
                "seed": settings.seed,
                **score(pipeline, pair, edited.frames),
                "quality": quality(pair, edited.frames),
                "seconds": seconds,
            }
            others = other_strengths(groups, index)
            if others:
                row["strength_right_raw"] = is_nearest(edited.frames, pair.target, [pairs[other].target for other in others])
            delivered = None
            if full_size is not None:
                result = EditResult(edited, vae_round_trip(pipeline, request.source.frames))
                full = full_size.pairs[index]
                delivered = deliver_edit(pipeline, full.request, full_size, request, result, settings)
                row |= score_delivered(pair, result, full, delivered)
                if others:
                    row["strength_right"] = is_nearest(delivered, full.target, [full_size.pairs[other].target for other in others])
            rows.append(row)
            shown = {} if before is None else {"before": before.frames(index), "notes": (*notes(row), before.note(index))}
            bands.append(make_band(request, edited.frames, pair.target, delivered=delivered, **{"notes": notes(row), **shown}, cell_side=96))
        report = {
            **summary(rows),
            **strengths_right(rows, "strength_right_raw"),
            **strengths_right(rows, "strength_right"),
            **{f"by_{group}": by_group(rows, group) for group in groups},
            **({} if before is None else {"before": before.summary}),
            "command": command,
            "settings": asdict(settings),
            "psnr_cap": PSNR_CAP,
            "config": asdict(pipeline.config),
            "per_clip": rows,
        }
        write_json(folder / REPORT, report)
        _write_sheets(folder, bands, report)
    return report


def apply_modes(request: EditRequest, settings: EvaluationSettings, pairs: Sequence[PairedEdit], index: int) -> EditRequest:
    """Applies the settings' reference and instruction modes to the request of pairs[index]."""
    if settings.reference_mode == "source_frame":
        request = replace(request, reference=request.source.frames[0])
    if settings.instruction_mode == "empty":
        return replace(request, instruction="")
    if settings.instruction_mode == "wrong":
        return replace(request, instruction=wrong_instruction(request.instruction, pairs, index))
    return request


def wrong_instruction(own: str, pairs: Sequence[PairedEdit], index: int) -> str:
    """Returns another clip's instruction: the first different one, searched from half the set further on. Raises UserError if all are equal."""
    count = len(pairs)
    for step in range(count):
        other = pairs[(index + count // 2 + step) % count].request.instruction
        if other != own:
            return other
    raise UserError("no wrong instruction to be had", where="instruction_mode", got="clips that all ask for the same")


def show_steps(steps: Iterable) -> Iterable:
    """Wraps the sampling steps in a progress bar, if stderr is a terminal."""
    return tqdm(steps, desc="steps", leave=False, disable=None)


def timed_edit(pipeline: Editor, request: EditRequest, settings: EvaluationSettings) -> tuple[Clip, float]:
    """Returns the edited clip, on the request's device, and the seconds that the edit took."""
    start = time.perf_counter()
    edited = pipeline.edit(request, **settings.sampling, progress=show_steps)
    return replace(edited, frames=edited.frames.to(request.source.frames)), time.perf_counter() - start


@torch.inference_mode()
def vae_round_trip(pipeline: Editor, frames: Tensor) -> Tensor:
    """Returns the frames as the VAE renders them, (F, H, W, 3) on their device."""
    return pipeline.vae.decode(pipeline.vae.encode(frames)).to(frames)


def deliver_edit(
    pipeline: Editor, request: EditRequest, full_size: FullSizePairs, evaluated: EditRequest, result: EditResult, settings: EvaluationSettings
) -> Tensor:
    """The request at the source's own size -> what `mive edit` delivers, (F, H, W, 3).

    `evaluated` is the request that gave `result`. If delivery needs the edit at another size, the model edits again.
    """
    request = replace(request, instruction=evaluated.instruction)
    if settings.reference_mode == "source_frame":
        request = replace(request, reference=request.source.frames[0])
    fitted = full_size.fit(request, pipeline.config.edit_pixels)
    edited, round_trip = result.edited.frames, result.round_trip
    if not same_request(fitted, evaluated):
        edited, round_trip = timed_edit(pipeline, fitted, settings)[0].frames, vae_round_trip(pipeline, fitted.source.frames)
    return torch.stack(list(deliver(request.source.frames, edited, round_trip, request.reference)))


def score_delivered(pair: PairedEdit, result: EditResult, full: PairedEdit, delivered: Tensor) -> dict:
    """DELIVERY_FIGURES of one clip: the pair at the model's size with its result, and at full size with what is delivered."""
    if pair.target is None or full.target is None:
        return dict.fromkeys(DELIVERY_FIGURES, dict.fromkeys(FIGURES))
    source, reference = full.request.source.frames, full.request.reference
    return {
        "delivered": pair_psnr(delivered, full),
        "round_trip": pair_psnr(result.round_trip, pair),
        **{name: pair_psnr(baseline(source, reference), full) for name, baseline in FULL_SIZE_BASELINES.items()},
    }


@torch.inference_mode()
def score(pipeline: Editor, pair: PairedEdit, edited: Tensor) -> dict:
    """Figures of one clip, edited (F, H, W, 3), and of the baselines; None without a target or for an empty region."""
    if pair.target is None:
        names = ("edited_fraction", *COMPLETION, *WORST_FRAME, "first_frame_gap", *FIGURES)
        return {**dict.fromkeys(names), **dict.fromkeys(BASELINES, dict.fromkeys(FIGURES))}
    source, reference, target, mask = pair.request.source.frames, pair.request.reference, pair.target, edited_region(pair)
    baselines = {"vae_ceiling": vae_round_trip(pipeline, target), "copy_source": source, "repeat_reference": reference.expand_as(target)}
    ceiling = baselines["vae_ceiling"]
    completion: dict[str, Any] = {}
    for suffix, frames in (("", edited), ("_ceiling", ceiling)):
        match = match_object(frames, source, target, mask, pair.colour)
        completion |= {
            f"edit_completion{suffix}": edit_completion(frames, source, target),
            f"object_match{suffix}": match and {"matches": match.matches, **asdict(match)},
            f"mean_colour_distance{suffix}": mean_colour_distance(frames, target, mask),
        }
    gap: float | None = None
    if shows_edit(reference, source):  # the VAE is causal: its first frame depends on no other
        round_trip = ceiling if torch.equal(reference, target[0]) else vae_round_trip(pipeline, reference[None])
        gap = first_frame_gap(edited[0], target[0], round_trip[0])
    return {
        "edited_fraction": mask.float().mean().item(),
        **completion,
        **worst_frame(edited, ceiling, target, mask),
        "first_frame_gap": gap,
        **pair_psnr(edited, pair),
        **{name: pair_psnr(frames, pair) for name, frames in baselines.items()},
    }


def edited_region(pair: PairedEdit) -> Tensor:
    """(F, H, W) bool: the pair's mask; without one everything."""
    return torch.ones(pair.request.source.frames.shape[:3], dtype=torch.bool) if pair.mask is None else pair.mask


def pair_psnr(frames: Tensor, pair: PairedEdit) -> dict[str, float | None]:
    """FIGURES of frames (F, H, W, 3), compared with the pair's target."""
    return region_psnr(frames, pair.target, edited_region(pair))


def other_strengths(groups: Mapping[str, Sequence[str]], index: int) -> list[int]:
    """Returns the other clips of the same look, if the clip is one of LOOK_STRENGTHS."""
    labels = list(zip(groups.get("kind", ()), groups.get("edit", ())))
    if not labels or labels[index][0] != LOOK_STRENGTHS:
        return []
    return [other for other, label in enumerate(labels) if label == labels[index] and other != index]


def strengths_right(rows: Sequence[dict], key: str) -> dict:
    """For LOOK_STRENGTHS: how many clips are nearest to the target of their own strength by the rows' `key`, altogether and by look."""
    judged = [row for row in rows if row.get(key) is not None]
    if not judged:
        return {}
    looks = sorted({row["edit"] for row in judged})
    by_look = {look: sum(row[key] for row in judged if row["edit"] == look) for look in looks}
    return {key: {"clips": len(judged), "right": sum(by_look.values()), "by_look": by_look}}


def summary(rows: Sequence[dict]) -> dict:
    """Means over the clips that have each figure, and the number of those clips."""
    means: dict[str, Any] = {
        "clips": len(rows),
        "clips_with_target": sum(row["psnr_edited"] is not None or row["psnr_kept"] is not None for row in rows),
        "clips_with_kept": sum(row["psnr_kept"] is not None for row in rows),
    }
    for key in FIGURES:
        means[key] = mean([row[key] for row in rows])
    for key, completion in (("success_rate", "edit_completion"), ("success_rate_ceiling", "edit_completion_ceiling")):
        means[key] = mean([None if row[completion] is None else float(row[completion] >= SUCCESS_THRESHOLD) for row in rows])
    for name in ("object_match", "object_match_ceiling"):
        means[name] = mean([row[name] and float(row[name]["matches"]) for row in rows])
    means["clips_with_object_match"] = sum(row["object_match"] is not None for row in rows)
    for key in ("mean_colour_distance", "mean_colour_distance_ceiling", *WORST_FRAME):
        means[key] = mean([row[key] for row in rows])
    gaps = [row["first_frame_gap"] for row in rows if row["first_frame_gap"] is not None]
    close = mean([float(gap <= CLOSE_GAP) for gap in gaps])
    means["first_frame_gap"] = {"clips": len(gaps), "mean": mean(gaps), "within_1_db": close}
    for name in (*BASELINES, *(name for name in DELIVERY_FIGURES if rows and name in rows[0])):
        means[name] = {key: mean([row[name][key] for row in rows]) for key in FIGURES}
    if rows and "quality" in rows[0]:
        means["quality"] = {key: mean([row["quality"][key] for row in rows]) for key in QUALITY}
    return means | {"seconds_per_clip": mean([row["seconds"] for row in rows])}


def by_group(rows: Sequence[dict], group: str) -> dict[str, dict]:
    """A summary for each name in the group."""
    return {name: summary([row for row in rows if row[group] == name]) for name in sorted({row[group] for row in rows} - {""})}


def notes(row: dict) -> tuple[str, ...]:
    """The lines beside the reference on a contact sheet."""
    lines = [" · ".join(text for text in (row["name"], row.get("kind"), row.get("edit")) if text)]
    delivered = {key: f", delivered {decibels(value)}" for key, value in row.get("delivered", {}).items()}
    if row["psnr_edited"] is not None:
        right = "" if row["edit_completion"] is None else "right, " if row["edit_completion"] >= SUCCESS_THRESHOLD else "not right, "
        compared = (
            f"copy {decibels(row['copy_source']['psnr_edited'])}, ceiling {decibels(row['vae_ceiling']['psnr_edited'])}{delivered.get('psnr_edited', '')}"
        )
        lines.append(f"{right}edited {row['psnr_edited']:.1f} dB ({compared})")
    if row["psnr_kept"] is not None:
        compared = (
            f"repeat {decibels(row['repeat_reference']['psnr_kept'])}, ceiling {decibels(row['vae_ceiling']['psnr_kept'])}{delivered.get('psnr_kept', '')}"
        )
        lines.append(f"kept {row['psnr_kept']:.1f} dB ({compared})")
    return tuple(line for line in lines if line)


def write_json(path: Path, values: dict) -> None:
    """Writes the values atomically; raises ValueError for NaN."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_sheets(folder: Path, bands: Sequence[Band], report: dict) -> None:
    heading = f"{report['clips']} clips · edited {decibels(report['psnr_edited'])} dB · kept {decibels(report['psnr_kept'])} dB"
    if "before" in report:
        heading += f" · before: edited {decibels(report['before']['psnr_edited'])} dB, kept {decibels(report['before']['psnr_kept'])} dB"
    if "delivered" in report:
        heading += f" · delivered {decibels(report['delivered']['psnr_edited'])} and {decibels(report['delivered']['psnr_kept'])} dB"
    write_sheet(folder / "sheet.png", bands, heading, across=min(SHEET_ACROSS, math.ceil(len(bands) / 2)))
    if len(bands) > PAGE_CLIPS:
        (folder / "sheets").mkdir()
        for page, start in enumerate(range(0, len(bands), PAGE_CLIPS)):
            write_sheet(folder / "sheets" / f"{page:02d}.png", bands[start : start + PAGE_CLIPS], across=2)
