"""Published sets of video edits, as they lie on the disk after unpacking -> entries of a manifest.

OpenVE-3M: a table for each kind of edit (local_add.csv, global_style.csv, ...) with the columns `prompt`, `original_video` and
`video`, some separated by commas and some by semicolons; paths are relative to the folder of videos.
Senorita-2M: a JSON list for each kind (updated_data_obj_removal.json, ...) of objects with `source_video_path`,
`target_video_path`, `instruction` and `enhanced_instruction`; paths begin with the folder's name before it was uploaded
(./obj_swap_videos/), where the archives unpack into one with `_upload` in its name.
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

VIDEO_FOLDERS = ("", "videos", "videos_folders")  # of OpenVE-3M, below the set's own
UPLOADED = ("{}", "{}_upload", "{}_upload2", "{}_videos_upload", "{}_videos_upload2")  # what a folder of Senorita-2M may be called
PREFIXES, SUFFIX = ("updated_data_", "data_"), "_videos"  # around the kind of edit in Senorita's file names


@dataclass(frozen=True)
class LeftOut:
    """A row that is no pair."""

    where: str
    why: str


Found = Iterator[ManifestEntry | LeftOut]


def import_set(layout: str, folder: str | Path, output: str | Path, edits: tuple[str, ...] = ()) -> tuple[int, list[LeftOut]]:
    """Writes the manifest of a set -> how many pairs it has, and what was left out, which NAME.left_out.jsonl lists.

    `edits` keeps those kinds only. The reference of a pair is its target's first frame. Raises UserError for a folder that is no such
    set, or holds no whole pair.
    """
    folder = check_input(folder, "folder")
    tables = sorted(path for path in folder.rglob("*" + SUFFIXES[layout]) if path.is_file())
    if not tables:
        raise UserError(f"the folder holds no {SUFFIXES[layout]} tables", where=folder, expected=f"the unpacked files of {layout}")
    pairs, left_out = [], []
    for found in (found for table in tables for found in LAYOUTS[layout](table, folder)):
        if isinstance(found, LeftOut):
            left_out.append(found)
        elif not edits or found.edit in edits:
            pairs.append(found)
    if not pairs:
        raise UserError("the folder holds no whole pair", where=folder, got=f"{left_out[0].where}: {left_out[0].why}" if left_out else f"no {', '.join(edits)}")
    output = write_manifest(output, pairs)
    if left_out:
        write_table(output.with_suffix(".left_out.jsonl"), [vars(row) for row in left_out])
    return len(pairs), left_out


def read_openve(table: Path, folder: Path) -> Found:
    """The rows of one table; a table of other columns holds none."""
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
                yield LeftOut(where, f"{len(values)} columns where the table has {len(columns)}")
                continue
            row = dict(zip(columns, values))
            places = [folder / name for name in VIDEO_FOLDERS]
            yield _pair(where, row["prompt"], row.get("edited_type") or table.stem, *(_first(places, row[key]) for key in ("original_video", "video")))


def read_senorita(table: Path, folder: Path) -> Found:
    """The objects of one list; a file of something else holds none."""
    try:
        items = json.loads(table.read_text(encoding="utf-8"))
    except ValueError as error:
        yield LeftOut(str(table), f"not JSON ({error})")
        return
    kind = table.stem
    for prefix in PREFIXES:
        kind = kind.removeprefix(prefix)
    for number, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, dict) and {"source_video_path", "target_video_path"} <= item.keys():
            words = item.get("instruction") or item.get("enhanced_instruction") or ""
            yield _pair(
                f"{table}[{number}]", words, kind.removesuffix(SUFFIX), *(_uploaded(folder, item[key]) for key in ("source_video_path", "target_video_path"))
            )


def _pair(where: str, words: object, edit: str, source: Path | str, target: Path | str) -> ManifestEntry | LeftOut:
    """Text in place of a path is what was looked for and not found."""
    for what, path in (("source", source), ("target", target)):
        if not isinstance(path, Path):
            return LeftOut(where, f"the {what} {path!r} is not there")
    if not isinstance(words, str) or not words.strip():
        return LeftOut(where, "there is no instruction")
    return ManifestEntry(source, None, " ".join(words.split()), target, name=target.stem, edit=edit)


def _first(places: list[Path], name: str) -> Path | str:
    inside = not name.startswith("/") and ".." not in Path(name).parts and name
    return next((place / name for place in places if inside and (place / name).is_file()), str(name))


def _uploaded(folder: Path, name: object) -> Path | str:
    parts = Path(name).parts if isinstance(name, str) and name else ("",)
    stem = parts[0].removesuffix(SUFFIX)
    return next(
        (found for form in UPLOADED if isinstance(found := _first([folder], "/".join((form.format(stem if form != "{}" else parts[0]), *parts[1:]))), Path)),
        str(name),
    )


LAYOUTS: dict[str, Callable[[Path, Path], Found]] = {"openve": read_openve, "senorita": read_senorita}
SUFFIXES = {"openve": ".csv", "senorita": ".json"}
