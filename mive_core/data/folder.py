"""A folder of pairs, as they are collected by hand -> what a manifest would say of them.

source/NAME.mp4       the clip before; any video, or a folder of frames
target/NAME.mp4       the same clip edited, as long
NAME.txt              what was done, in words; instruction.txt speaks for every pair that has no text of its own
reference/NAME.png    may be left out: the target's first frame
mask/NAME.mp4         may be left out; white where the edit is
"""

import os
from pathlib import Path

from ..errors import UserError
from ..media.paths import check_input
from ..media.remote import is_url
from .manifest import ManifestEntry, read_manifest

LAYOUT = "source/NAME.mp4, target/NAME.mp4 and NAME.txt"
COMMON = "instruction.txt"
NO_CLIPS = (".txt", ".json", ".jsonl", ".md", ".db", ".ini")  # what else lies about in such folders
MAX_NAMED = 3  # in a message


def read_pairs(place: str | os.PathLike, allow_empty_instruction: bool = False) -> list[ManifestEntry]:
    """A folder of pairs, or a manifest, which may be a URL. Raises UserError, and unless it `allow_empty_instruction` for an instruction without words too."""
    if is_url(place) or not check_input(place, "pairs").is_dir():
        return read_manifest(place, allow_empty_instruction=allow_empty_instruction)
    return read_folder(Path(place))


def read_folder(folder: Path) -> list[ManifestEntry]:
    """The pairs of a folder, by name. Raises UserError for a clip without a partner or without words, and for what lies outside."""
    where = f"pairs {str(folder)!r}"
    sources, targets, references, masks = (_clips(folder, kind) for kind in ("source", "target", "reference", "mask"))
    if not sources and not targets:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise UserError("the folder holds no pairs", where=where, got=held or "an empty folder", expected=LAYOUT)
    for here, there, kind, other in (
        (sources, targets, "source", "target"),
        (targets, sources, "target", "source"),
        (references, sources, "reference", "source"),
        (masks, sources, "mask", "source"),
    ):
        alone = [path.name for name, path in here.items() if name not in there]
        if alone:
            raise UserError(f"a {kind} has no {other} of its name", where=where, got=_listed(alone), expected=LAYOUT)
    words = {name: _instruction(folder, name) for name in sources}
    mute = [f"{name}.txt" for name, text in words.items() if not text]
    if mute:
        raise UserError("a pair has no instruction", where=where, got=f"no words in {_listed(mute)}", expected=f"a text for each pair, or {COMMON} for all")
    return [ManifestEntry(source, references.get(name), words[name], targets[name], masks.get(name), name) for name, source in sources.items()]


def _clips(folder: Path, kind: str) -> dict[str, Path]:
    """Name -> file or folder of frames. Raises UserError for two of one name, and for links that lead outside."""
    found: dict[str, Path] = {}
    paths = sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []
    for path in paths:
        if path.name.startswith(".") or path.suffix.lower() in NO_CLIPS:
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise UserError(f"two {kind}s have one name", where=folder, got=f"{found[name].name}, {path.name}")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError("leads outside the folder", where=f"{kind} {str(path)!r}", fix="put the file itself there")
        found[name] = path
    return found


def _instruction(folder: Path, name: str) -> str:
    """The pair's own words, else those for all, on one line; empty where there are none."""
    for path in (folder / f"{name}.txt", folder / COMMON):
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"is not UTF-8 text ({error.reason} at byte {error.start})", where=f"instruction {str(path)!r}", fix="save it as UTF-8"
                ) from None
    return ""


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
