"""The edited videos of several systems, found in the folders that `mive edit --manifest`, `mive eval` or other programs wrote."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.folder import abbreviate
from ..data.manifest import ManifestEntry
from ..errors import UserError
from ..evaluation.before import EDITED, REPORT
from ..media.encode import VIDEO_SUFFIXES
from ..media.paths import check_input, numbered_name


@dataclass(frozen=True)
class System:
    """What is compared: a model, or the same model with other settings."""

    name: str
    videos: tuple[Path, ...]  # its edit of each clip: a video file or a folder of frames


def read_systems(folders: Sequence[tuple[str, str]], entries: Sequence[ManifestEntry]) -> list[System]:
    """(name, folder) of each system, and the clips -> the systems.

    A folder holds videos as `mive edit --manifest` or `mive eval` name them, or NAME.mp4 (any video, or a folder of frames) by the clip's
    name. Raises UserError for fewer than two systems, equal names, and systems that lack clips, with which and how many.
    """
    names = [name for name, _ in folders]
    if len(names) < 2:
        raise UserError("one system alone cannot be compared", got=", ".join(names) or "none", expected="two folders or more")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError("two systems have one name", got=", ".join(repeated), fix="name them: NAME=DIR")
    for entry in entries:
        entry.check()
    found = {name: _find_videos(check_input(folder, f"system {name}"), entries) for name, folder in folders}
    missing = {name: [_title(index, entry) for index, entry in enumerate(entries) if videos[index] is None] for name, videos in found.items()}
    lacking = [f"{name} lacks {len(titles)} of {len(entries)} ({abbreviate(titles)})" for name, titles in missing.items() if titles]
    if lacking:
        raise UserError("every system needs every clip", got="; ".join(lacking), fix="edit these, or leave their rows out of the manifest")
    return [System(name, tuple(path for path in videos if path is not None)) for name, videos in found.items()]


def _find_videos(folder: Path, entries: Sequence[ManifestEntry]) -> list[Path | None]:
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
    try:
        names = [row["name"] for row in json.loads((folder / REPORT).read_text(encoding="utf-8"))["per_clip"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("the evaluation's report is damaged", where=folder / REPORT, got=str(error)[:80], fix="evaluate again") from None
    own = [entry.name for entry in entries]
    numbers = range(len(own)) if names == own else [names.index(name) if name and names.count(name) == 1 else -1 for name in own]
    paths = [folder / EDITED / f"{number:03d}.mp4" for number in numbers]
    return [path if number >= 0 and path.is_file() else None for number, path in zip(numbers, paths)]


def _is_video(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES)


def _title(index: int, entry: ManifestEntry) -> str:
    return entry.name or f"row {index + 1}"
