"""Judges edits: Qwen3-VL reads every edit twice, the second time with its frames in another order, and gives the numbers of a rubric.

A clip's score is the mean of its two readings, whose agreement is reported as Krippendorff's alpha. Journal and executor are those of the
other commands that process many clips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import UserError
from ..evaluation.agreement import krippendorff_alpha
from ..evaluation.evaluate import write_json
from ..evaluation.metrics import mean
from ..media.fit import resize_and_crop, valid_num_frames
from ..media.paths import check_input, check_output
from ..media.remote import local_copy
from ..media.video import read_clip, read_num_frames
from ..types import PairedEdit
from .edited_videos import find_edits
from .executor import Executor
from .folder import abbreviate
from .journal import Outcome, Task, fingerprint, run_resumable
from .judge import FPS, MAX_REFERENCE_TOKENS, MAX_VIDEO_TOKENS, Judge
from .manifest import ManifestEntry, load_entry, read_reference
from .pace import MAX_TRIMMED
from .rubrics import Rubric

SHUFFLE_SEED = 1  # of the second reading


@dataclass(frozen=True)
class JudgeWorker:
    """Reads the edits of manifest entries, which are their targets."""

    judge: Judge

    def read(self, entry: ManifestEntry) -> PairedEdit:
        entry.check()
        if entry.target is None:
            raise UserError("there is no edit to judge")
        pair = _load(entry)
        if not self.judge.rubric.shows_reference:
            return pair
        if entry.reference is None:
            raise UserError("the rubric needs a reference image, and the clip has none")
        return replace(pair, request=replace(pair.request, reference=read_reference(entry)))

    def work(self, entry: ManifestEntry, pair: PairedEdit) -> dict:
        return {"readings": [list(self.judge.rate(pair, seed)) for seed in (None, SHUFFLE_SEED)]}


def _load(entry: ManifestEntry) -> PairedEdit:
    """The source with the edit as target, at the source's size. An edit of the source's first frames alone is compared with these, one by one."""
    assert entry.target is not None
    alone, edit = replace(entry, reference=entry.source, first_frame=True, target=None, mask=None, keyframes=()), local_copy(entry.target, "edit")
    source_length, length = read_num_frames(local_copy(entry.source, "source")), read_num_frames(edit)
    if source_length is None or length is None or source_length - length < MAX_TRIMMED:
        return load_entry(replace(alone, target=entry.target))
    num_frames = valid_num_frames(length)
    pair = load_entry(alone, num_frames=num_frames)
    height, width = pair.request.source.frames.shape[1:3]
    frames = read_clip(edit, what="edit", num_frames=num_frames).frames
    return replace(pair, target=resize_and_crop(frames, (width, height)))


def judge_edits(
    entries: Sequence[ManifestEntry],
    load: Callable[[], Judge],
    rubric: Rubric,
    output: str | Path,
    *,
    model_id: object = "",
    executor: Executor = Executor(),
    described: Mapping[str, object] = MappingProxyType({}),
) -> dict:
    """Judges the entries' targets and writes the report -> the report. `described` are further keys of it.

    Readings stay in NAME.readings.jsonl beside it, and an interrupted run resumes. `load` returns the judge of that rubric, `model_id`
    identifies its model: if that changes, everything is read again. Raises UserError if no edit can be judged.
    """
    output = check_output(output, "output", (".json",))
    dependencies = (rubric, rubric.prompt, FPS, MAX_VIDEO_TOKENS, MAX_REFERENCE_TOKENS, SHUFFLE_SEED, model_id)
    tasks = [Task(fingerprint(dependencies, entry), entry.title, entry) for entry in entries]
    outcomes = run_resumable(tasks, lambda: JudgeWorker(load()), output.with_suffix(".readings.jsonl"), executor, "edits")
    report = {**described, "axes": list(rubric.axes), "scale": [float(rubric.numbers[0]), float(rubric.numbers[-1])], **summarize(entries, outcomes, rubric)}
    write_json(output, report)
    return report


def summarize(entries: Sequence[ManifestEntry], outcomes: Sequence[Outcome], rubric: Rubric) -> dict:
    """Means over the clips, by kind and edit too, the agreement of the readings, and each clip's scores."""
    rows: list[dict] = []
    for entry, outcome in zip(entries, outcomes):
        if outcome.result is not None:
            readings = [dict(zip(rubric.axes, reading)) for reading in outcome.result["readings"]]
            scores = {axis: sum(reading[axis] for reading in readings) / len(readings) for axis in rubric.axes}
            rows.append({"name": entry.title, "kind": entry.kind, "edit": entry.edit, "scores": scores, "readings": readings})
    ratings = {axis: np.array([[reading[axis] for reading in row["readings"]] for row in rows], dtype=float).reshape(-1, 2).T for axis in rubric.axes}
    ratings["all"] = np.concatenate(list(ratings.values()), axis=1)
    return {
        "clips": len(rows),
        "left_out": [{"name": outcome.title, "why": outcome.why} for outcome in outcomes if outcome.result is None],
        "mean": _means(rows, rubric),
        "by_kind": _by_group(rows, "kind", rubric),
        "by_edit": _by_group(rows, "edit", rubric),
        "alpha": {axis: krippendorff_alpha(values, rubric.level) for axis, values in ratings.items()},
        "alpha_level": rubric.level,
        "per_clip": rows,
    }


def _by_group(rows: Sequence[dict], group: str, rubric: Rubric) -> dict[str, dict]:
    return {name: _means([row for row in rows if row[group] == name], rubric) for name in sorted({row[group] for row in rows} - {""})}


def _means(rows: Sequence[dict], rubric: Rubric) -> dict[str, float | None]:
    means = {axis: mean([row["scores"][axis] for row in rows]) for axis in rubric.axes}
    return {**means, "all": mean(list(means.values()))}


def describe(report: dict) -> str:
    """The report as a table: a line for each axis, with its mean and the alpha of the two readings."""
    number = lambda value: "-" if value is None else f"{value:.2f}"
    width = max(map(len, report["mean"]))
    lines = [f"{'':{width}}   mean  alpha"]
    lines += [f"{axis:{width}}  {number(value):>5}  {number(report['alpha'][axis]):>5}" for axis, value in report["mean"].items()]
    return "".join(f"{line}\n" for line in lines)


def with_edits(entries: Sequence[ManifestEntry], folder: str | Path) -> list[ManifestEntry]:
    """The entries with their edits as targets, see find_edits. Raises UserError for missing edits: which and how many."""
    edits = find_edits(check_input(folder, "edits"), entries)
    missing = [entry.name or f"row {number}" for number, (entry, edit) in enumerate(zip(entries, edits), start=1) if edit is None]
    if missing:
        raise UserError("edits are missing", where=f"edits {str(folder)!r}", got=f"{len(missing)} of {len(edits)}: {abbreviate(missing)}")
    return [replace(entry, target=edit) for entry, edit in zip(entries, edits)]
