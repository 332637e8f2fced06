"""Filters a manifest for training: a judge rates the pairs, and the best of each kind of edit are kept (paper, training).

The paper keeps pairs that Qwen3-VL rates at least 9.3, at most 4000 per kind of edit. (ours) The lower of the judge's two ratings counts:
a pair must both follow the instruction and leave the rest unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..media.paths import check_output
from ..types import PairedEdit
from .executor import Executor
from .journal import Outcome, Task, fingerprint, run_resumable
from .judge import FPS, MAX_VIDEO_TOKENS, Judge
from .manifest import ManifestEntry, load_entry, write_manifest
from .rubrics import SCORE
from .tables import SUFFIXES

MIN_SCORE, MAX_PER_KIND = 9.3, 4000


@dataclass(frozen=True)
class ScoreWorker:
    """Rates the pairs of manifest entries."""

    judge: Judge

    def read(self, entry: ManifestEntry) -> PairedEdit:
        entry.check()
        if entry.target is None:
            raise UserError("the pair has no target, so there is nothing to rate")
        return load_entry(replace(entry, reference=None, mask=None))

    def work(self, entry: ManifestEntry, pair: PairedEdit) -> dict:
        instruction, faithfulness = self.judge.rate(pair)
        return {"instruction": instruction, "faithfulness": faithfulness, "edit": entry.edit}


def score(
    entries: Sequence[ManifestEntry],
    load: Callable[[], Judge],
    output: str | Path,
    *,
    min_score: float = MIN_SCORE,
    max_per_kind: int = MAX_PER_KIND,
    model_id: object = "",
    executor: Executor = Executor(),
) -> tuple[list[Outcome], list[ManifestEntry]]:
    """Rates the entries without a rating and writes the manifest of the best -> each entry's outcome, and the entries that are kept.

    All ratings stay in NAME.scores.jsonl beside the manifest, so another `min_score` or `max_per_kind` costs nothing. `load` returns the
    judge, `model_id` identifies it: if that changes, everything is rated again. Raises UserError if no pair is good enough.
    """
    output = check_output(output, "output", SUFFIXES)
    dependencies = (SCORE.prompt, FPS, MAX_VIDEO_TOKENS, model_id)
    tasks = [Task(fingerprint(dependencies, entry), entry.title, entry) for entry in entries]
    outcomes = run_resumable(tasks, lambda: ScoreWorker(load()), output.with_suffix(".scores.jsonl"), executor, "pairs")
    results = [outcome.result for outcome in outcomes]
    kept = [entries[index] for index in select_best(results, min_score, max_per_kind)]
    if not kept:
        best = max(_lower_rating(result) for result in results if result)
        raise UserError("no pair is good enough", where=f"least {min_score}", got=f"{best} at best", fix="ask for less: what is rated stays rated")
    write_manifest(output, kept)
    return outcomes, kept


def select_best(results: Sequence[dict | None], min_score: float, max_per_kind: int) -> list[int]:
    """Returns the sorted indices of the best results per kind of edit, among those whose lower rating is at least `min_score`."""
    good = {index: result for index, result in enumerate(results) if result and _lower_rating(result) >= min_score}

    def rank(index: int) -> tuple:
        result = good[index]
        return -_lower_rating(result), -result["instruction"] - result["faithfulness"], index

    by_kind: dict[str, list[int]] = {}
    for index in sorted(good, key=rank):
        by_kind.setdefault(good[index]["edit"], []).append(index)
    return sorted(index for indices in by_kind.values() for index in indices[:max_per_kind])


def _lower_rating(result: dict) -> float:
    return min(result["instruction"], result["faithfulness"])
