"""The edited videos of several systems, found in the folders that `mive edit --manifest`, `mive eval` or other programs wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.edited_videos import find_edits
from ..data.folder import abbreviate
from ..data.manifest import ManifestEntry
from ..errors import UserError
from ..media.paths import check_input


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
    found = {name: find_edits(check_input(folder, f"system {name}"), entries) for name, folder in folders}
    missing = {name: [_title(index, entry) for index, entry in enumerate(entries) if videos[index] is None] for name, videos in found.items()}
    lacking = [f"{name} lacks {len(titles)} of {len(entries)} ({abbreviate(titles)})" for name, titles in missing.items() if titles]
    if lacking:
        raise UserError("every system needs every clip", got="; ".join(lacking), fix="edit these, or leave their rows out of the manifest")
    return [System(name, tuple(path for path in videos if path is not None)) for name, videos in found.items()]


def _title(index: int, entry: ManifestEntry) -> str:
    return entry.name or f"row {index + 1}"
