"""Finds the edited videos of a manifest's entries in the folders that `mive edit --manifest`, `mive eval` or other programs wrote."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..evaluation.before import EDITED, REPORT, read_evaluation
from ..media.encode import VIDEO_SUFFIXES
from ..media.paths import numbered_name
from .manifest import ManifestEntry


def find_edits(folder: Path, entries: Sequence[ManifestEntry]) -> list[Path | None]:
    """The edit of each entry, a video file or a folder of frames; None where there is none.

    `folder` is an --output folder of `mive eval` or `mive edit --manifest`, whose entries may be some of these or in another order, or a
    folder of NAME.mp4. Raises UserError if it is no folder or its report is damaged.
    """
    if not folder.is_dir():
        raise UserError("is no folder", where=str(folder), expected="a folder of edited videos")
    if (folder / REPORT).is_file() and (folder / EDITED).is_dir():
        return _evaluated(folder, entries)
    found = {path.name if path.is_dir() else path.stem: path for path in sorted(folder.iterdir()) if _is_video(path)}
    without_number: dict[str, list[Path]] = {}
    for stem, path in found.items():
        without_number.setdefault(re.sub("^[0-9]{6}-?", "", stem), []).append(path)
    videos: list[Path | None] = []
    for index, entry in enumerate(entries):
        name = entry.name or Path(str(entry.source)).stem
        numbered = numbered_name(index, name, 6)
        same_name = without_number.get(numbered_name(0, name, 6)[7:], [])  # the row had another number in the manifest that was edited
        videos.append(found.get(numbered) or found.get(name) or (same_name[0] if len(same_name) == 1 and entry.name else None))
    return videos


def _evaluated(folder: Path, entries: Sequence[ManifestEntry]) -> list[Path | None]:
    """The videos of an evaluation: of the same pairs by their numbers, of others by their names."""
    _, names = read_evaluation(folder)
    own = [entry.name for entry in entries]
    numbers = range(len(own)) if names == own else [names.index(name) if name and names.count(name) == 1 else -1 for name in own]
    paths = [folder / EDITED / f"{number:03d}.mp4" for number in numbers]
    return [path if number >= 0 and path.is_file() else None for number, path in zip(numbers, paths)]


def _is_video(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES)
