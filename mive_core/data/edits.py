"""Batch editing: edits the entries of a manifest one by one into a folder of videos."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..evaluation.evaluate import Editor, EvaluationSettings, timed_edit
from ..media.paths import check_output_folder, numbered_name, remove_partial_files
from ..media.video import write_video
from ..types import EditRequest
from .executor import Executor
from .journal import Outcome, Task, fingerprint, run_resumable
from .manifest import ManifestEntry, load_entry

JOURNAL = "edits.jsonl"


@dataclass(frozen=True)
class EditWorker:
    """Edits numbered entries, each into a video file of the folder."""

    editor: Editor
    settings: EvaluationSettings
    folder: Path
    size: tuple[int, int] | None = None
    num_frames: int | None = None

    def read(self, item: tuple[int, ManifestEntry]) -> EditRequest:
        entry = item[1] if item[1].reference is None else replace(item[1], target=None)
        return load_entry(replace(entry, mask=None), self.size, self.num_frames).request

    def work(self, item: tuple[int, ManifestEntry], request: EditRequest) -> dict:
        number, entry = item
        edited, seconds = timed_edit(self.editor, request, self.settings)
        path = write_video(self.folder / f"{numbered_name(number, entry.name or Path(str(entry.source)).stem, 6)}.mp4", edited)
        return {"edited": path.name, "instruction": entry.instruction, "seconds": round(seconds, 3)}


def edit_all(
    entries: Sequence[ManifestEntry],
    load: Callable[[], Editor],
    folder: str | Path,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    model_id: object = "",
    executor: Executor = Executor(),
) -> list[Outcome]:
    """Edits the entries that are not yet edited -> each entry's outcome, with its file name; they are also in the folder's edits.jsonl.

    `load` returns the models, `model_id` identifies them: if that changes, everything is edited again. Raises UserError.
    """
    folder = check_output_folder(folder, "output")
    folder.mkdir(parents=True, exist_ok=True)
    dependencies = (asdict(settings), size, num_frames, model_id)
    tasks = [Task(fingerprint((dependencies, number), entry), entry.title, (number, entry)) for number, entry in enumerate(entries)]
    outcomes = run_resumable(
        tasks,
        lambda: EditWorker(load(), settings, folder.absolute(), size, num_frames),
        folder / JOURNAL,
        executor,
        "clips",
        lambda result: (folder / result["edited"]).is_file(),
    )
    remove_partial_files(folder)
    return outcomes
