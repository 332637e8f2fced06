"""Batch editing: edits the entries of a manifest one by one into a folder of videos."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..evaluation.evaluate import EvaluationSettings
from ..media.paths import check_output_folder, numbered_name, remove_partial_files
from ..pipeline import Pipeline
from .edit_file import FileOptions, PreparedEdit, edit_file, prepare
from .executor import Executor
from .journal import Outcome, Task, fingerprint, run_resumable
from .manifest import ManifestEntry

JOURNAL = "edits.jsonl"


@dataclass(frozen=True)
class EditWorker:
    """Edits numbered entries, each into a video file of the folder."""

    pipeline: Pipeline
    settings: EvaluationSettings
    folder: Path
    options: FileOptions

    def read(self, item: tuple[int, ManifestEntry]) -> PreparedEdit:
        return prepare(item[1], self.pipeline.config, self.options)

    def work(self, item: tuple[int, ManifestEntry], prepared: PreparedEdit) -> dict:
        number, entry = item
        output = self.folder / f"{numbered_name(number, entry.name or Path(str(entry.source)).stem, 6)}{self.options.encoding.suffix}"
        path, seconds = edit_file(self.pipeline, prepared, output, self.settings, self.options)
        return {"edited": path.name, "instruction": entry.instruction, "seconds": round(seconds, 3)}


def edit_all(
    entries: Sequence[ManifestEntry],
    load: Callable[[], Pipeline],
    folder: str | Path,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    options: FileOptions = FileOptions(),
    model_id: object = "",
    executor: Executor = Executor(),
) -> list[Outcome]:
    """Edits the entries that are not yet edited -> each entry's outcome, with its file name; they are also in the folder's edits.jsonl.

    `load` returns the models, `model_id` identifies them: if that changes, everything is edited again. Raises UserError.
    """
    folder = check_output_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    dependencies = (asdict(settings), asdict(options), model_id)
    tasks = [Task(fingerprint((dependencies, number), entry), entry.title, (number, entry)) for number, entry in enumerate(entries)]
    outcomes = run_resumable(
        tasks,
        lambda: EditWorker(load(), settings, folder.absolute(), options),
        folder / JOURNAL,
        executor,
        "clips",
        lambda result: (folder / result["edited"]).is_file(),
    )
    remove_partial_files(folder)
    return outcomes
