"""Which pairs of a manifest are good enough to train on: rated by a judge, the best of each kind kept (paper, training).

The paper keeps pairs that Qwen3-VL gives at least 9.3, at most 4000 of a kind of edit. (ours) Of the judge's two numbers the lower one
counts: a pair must both do what was asked and leave the rest alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..media.paths import check_output
from ..types import PairedEdit
from .executor import Executor
from .journal import Outcome, Task, mark_of, worked_through
from .judge import FPS, MAX_VIDEO_TOKENS, PROMPT, Judge
from .manifest import ManifestEntry, load_entry, write_manifest
from .tables import SUFFIXES

LEAST, MOST = 9.3, 4000


@dataclass(frozen=True)
class ScoreWorker:
    """Rates entries."""

    judge: Judge

    def read(self, entry: ManifestEntry) -> PairedEdit:
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
    least: float = LEAST,
    most: int = MOST,
    made_by: object = "",
    executor: Executor = Executor(),
) -> tuple[list[Outcome], list[ManifestEntry]]:
    """Rates what has no rating yet and writes the manifest of the best -> each entry's outcome, and what was kept.

    The ratings are kept in NAME.scores.jsonl beside the manifest, so another `least` or `most` costs nothing. Raises UserError where
    not one pair is good enough.
    """
    output = check_output(output, "output", SUFFIXES)
    contract = (PROMPT.read_text(encoding="utf-8"), FPS, MAX_VIDEO_TOKENS, made_by)
    tasks = [Task(mark_of(contract, entry), entry.title, entry) for entry in entries]
    outcomes = worked_through(tasks, lambda: ScoreWorker(load()), output.with_suffix(".scores.jsonl"), executor, "pairs")
    kept = [entries[index] for index in chosen([outcome.result for outcome in outcomes], least, most)]
    if not kept:
        best = max(min(r["instruction"], r["faithfulness"]) for outcome in outcomes if (r := outcome.result))
        raise UserError("no pair is good enough", where=f"least {least}", got=f"{best} at best", fix="ask for less: what is rated stays rated")
    write_manifest(output, kept)
    return outcomes, kept


def chosen(results: Sequence[dict | None], least: float, most: int) -> list[int]:
    """The places of what is kept, in order: rated at least that by its lower number, of each kind of edit the best."""

    def rank(place: int) -> tuple:
        instruction, faithfulness = results[place]["instruction"], results[place]["faithfulness"]
        return -min(instruction, faithfulness), -instruction - faithfulness, place

    good = sorted((place for place, result in enumerate(results) if result and min(result["instruction"], result["faithfulness"]) >= least), key=rank)
    kinds: dict[str, list[int]] = {}
    for place in good:
        kinds.setdefault(results[place]["edit"], []).append(place)
    return sorted(place for places in kinds.values() for place in places[:most])
