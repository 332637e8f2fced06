"""Imports published datasets of video edits, as unpacked on disk, into manifests.

OpenVE-3M: a table for each kind of edit (local_add.csv, global_style.csv, ...) with the columns `prompt`, `original_video` and
`video`, separated by commas or semicolons; paths are relative to the folder of videos.
Senorita-2M: a JSON list for each kind (updated_data_obj_removal.json, ...) of objects with `source_video_path`, `target_video_path`,
`instruction` and `enhanced_instruction`; paths start with the folder's original name (./obj_swap_videos/), but the archives unpack into
a folder with `_upload` in its name.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..media.paths import check_input
from .manifest import ManifestEntry, write_manifest
from .tables import write_table

VIDEO_FOLDERS = ("", "videos", "videos_folders")  # of OpenVE-3M, inside the dataset's folder
UPLOAD_NAMES = ("{}", "{}_upload", "{}_upload2", "{}_videos_upload", "{}_videos_upload2")  # possible names of a Senorita-2M folder
PREFIXES, SUFFIX = ("updated_data_", "data_"), "_videos"  # around the kind of edit in Senorita-2M's file names


@dataclass(frozen=True)
class SkippedRow:
    """A row that gives no pair."""

    where: str
    why: str


Rows = Iterator[ManifestEntry | SkippedRow]


def import_dataset(layout: str, folder: str | Path, output: str | Path, edits: tuple[str, ...] = ()) -> tuple[int, list[SkippedRow]]:
    """Writes the manifest of a dataset -> the number of pairs, and the skipped rows, which are also written to NAME.left_out.jsonl.

    `edits` keeps only those kinds. A pair's reference is the first frame of its target. Raises UserError if the folder does not hold
    that dataset, or no complete pair.
    """
    folder = check_input(folder, "folder")
    tables = sorted(path for path in folder.rglob("*" + SUFFIXES[layout]) if path.is_file())
    if not tables:
        raise UserError(f"the folder holds no {SUFFIXES[layout]} tables", where=folder, expected=f"the unpacked files of {layout}")
    pairs: list[ManifestEntry] = []
    skipped: list[SkippedRow] = []
    for row in (row for table in tables for row in LAYOUTS[layout](table, folder)):
        if isinstance(row, SkippedRow):
            skipped.append(row)
        elif not edits or row.edit in edits:
            pairs.append(row)
    if not pairs:
        raise UserError("the folder holds no whole pair", where=folder, got=f"{skipped[0].where}: {skipped[0].why}" if skipped else f"no {', '.join(edits)}")
    output = write_manifest(output, pairs)
    if skipped:
        write_table(output.with_suffix(".left_out.jsonl"), [vars(row) for row in skipped])
    return len(pairs), skipped


def read_openve(table: Path, folder: Path) -> Rows:
    """Reads one table; a table with other columns has no rows."""
    csv.field_size_limit(sys.maxsize)
    with open(table, encoding="utf-8-sig", newline="", errors="replace") as file:
        header = file.readline()
        separator = max(",;\t", key=header.count)
        columns = next(csv.reader([header], delimiter=separator), [])
        if not {"prompt", "original_video", "video"} <= set(columns):
            return
        rows = csv.reader(file, delimiter=separator)
        for values in rows:
            where = f"{table}:{rows.line_num + 1}"
            if len(values) != len(columns):
                yield SkippedRow(where, f"{len(values)} columns where the table has {len(columns)}")
                continue
            row = dict(zip(columns, values))
            folders = [folder / name for name in VIDEO_FOLDERS]
            source, target = (_first_existing(folders, row[key]) for key in ("original_video", "video"))
            yield _pair(where, row["prompt"], row.get("edited_type") or table.stem, source, target)


def read_senorita(table: Path, folder: Path) -> Rows:
    """Reads one list; any other JSON file has no rows."""
    try:
        items = json.loads(table.read_text(encoding="utf-8"))
    except ValueError as error:
        yield SkippedRow(str(table), f"not JSON ({error})")
        return
    kind = table.stem
    for prefix in PREFIXES:
        kind = kind.removeprefix(prefix)
    for number, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and {"source_video_path", "target_video_path"} <= item.keys():
            instruction = item.get("instruction") or item.get("enhanced_instruction") or ""
            source, target = (_find_upload(folder, item[key]) for key in ("source_video_path", "target_video_path"))
            yield _pair(f"{table}[{number}]", instruction, kind.removesuffix(SUFFIX), source, target)


def _pair(where: str, instruction: object, edit: str, source: Path | str, target: Path | str) -> ManifestEntry | SkippedRow:
    """`source` and `target` are paths, or the names of files that were not found."""
    if not isinstance(source, Path):
        return SkippedRow(where, f"the source {source!r} is not there")
    if not isinstance(target, Path):
        return SkippedRow(where, f"the target {target!r} is not there")
    if not isinstance(instruction, str) or not instruction.strip():
        return SkippedRow(where, "there is no instruction")
    return ManifestEntry(source, None, " ".join(instruction.split()), target, name=target.stem, edit=edit)


def _first_existing(folders: list[Path], name: str) -> Path | str:
    """The file of that name in the first folder that has it, else the name."""
    inside = not name.startswith("/") and ".." not in Path(name).parts and name
    return next((folder / name for folder in folders if inside and (folder / name).is_file()), str(name))


def _find_upload(folder: Path, name: object) -> Path | str:
    """The file, with its folder under any of its UPLOAD_NAMES, else the name."""
    parts = Path(name).parts if isinstance(name, str) and name else ("",)
    stem = parts[0].removesuffix(SUFFIX)
    for form in UPLOAD_NAMES:
        found = _first_existing([folder], "/".join((form.format(stem if form != "{}" else parts[0]), *parts[1:])))
        if isinstance(found, Path):
            return found
    return str(name)


LAYOUTS: dict[str, Callable[[Path, Path], Rows]] = {"openve": read_openve, "senorita": read_senorita}
SUFFIXES = {"openve": ".csv", "senorita": ".json"}
