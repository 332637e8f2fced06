"""Reads a hand-made folder of pairs as manifest entries.

source/NAME.mp4       the original clip: any video, or a folder of frames
target/NAME.mp4       the edited clip, of the same length
NAME.txt              the instruction; instruction.txt applies to every pair without a text of its own
reference/NAME.png    optional; default: the target's first frame
mask/NAME.mp4         optional; white inside the edit
"""

import os
from pathlib import Path

from ..errors import UserError
from ..media.paths import check_input
from ..media.remote import is_url
from .manifest import ManifestEntry, read_manifest

LAYOUT = "source/NAME.mp4, target/NAME.mp4 and NAME.txt"
COMMON_INSTRUCTION = "instruction.txt"
IGNORED_SUFFIXES = (".txt", ".json", ".jsonl", ".md", ".db", ".ini")  # other files that such folders contain
MAX_NAMED = 3  # names in a message


def read_pairs(location: str | os.PathLike, allow_empty_instruction: bool = False, absolute: bool = True) -> list[ManifestEntry]:
    """Reads a folder of pairs, or a manifest, which may be a URL and whose bad rows are entries with a `problem`. Raises UserError.

    The arguments are read_manifest's.
    """
    if is_url(location) or not check_input(location, "pairs").is_dir():
        return read_manifest(location, allow_empty_instruction=allow_empty_instruction, strict=False, absolute=absolute)
    return read_folder(Path(location))


def read_folder(folder: Path) -> list[ManifestEntry]:
    """Returns the pairs of a folder, matched by name. Raises UserError for unmatched clips, missing instructions and links out of the folder."""
    where = f"pairs {str(folder)!r}"
    sources, targets, references, masks = (_clips(folder, kind) for kind in ("source", "target", "reference", "mask"))
    if not sources and not targets:
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        raise UserError("the folder holds no pairs", where=where, got=names or "an empty folder", expected=LAYOUT)
    for clips, others, kind, other in (
        (sources, targets, "source", "target"),
        (targets, sources, "target", "source"),
        (references, sources, "reference", "source"),
        (masks, sources, "mask", "source"),
    ):
        unmatched = [path.name for name, path in clips.items() if name not in others]
        if unmatched:
            raise UserError(f"a {kind} has no {other} of its name", where=where, got=abbreviate(unmatched), expected=LAYOUT)
    instructions = {name: _instruction(folder, name) for name in sources}
    empty = [f"{name}.txt" for name, text in instructions.items() if not text]
    if empty:
        raise UserError(
            "a pair has no instruction", where=where, got=f"no words in {abbreviate(empty)}", expected=f"a text for each pair, or {COMMON_INSTRUCTION} for all"
        )
    return [ManifestEntry(source, references.get(name), instructions[name], targets[name], masks.get(name), name) for name, source in sources.items()]


def _clips(folder: Path, kind: str) -> dict[str, Path]:
    """Returns name -> file or folder of frames. Raises UserError for duplicate names and for links out of the folder."""
    found: dict[str, Path] = {}
    paths = sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []
    for path in paths:
        if path.name.startswith(".") or path.suffix.lower() in IGNORED_SUFFIXES:
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise UserError(f"two {kind}s have one name", where=folder, got=f"{found[name].name}, {path.name}")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError("leads outside the folder", where=f"{kind} {str(path)!r}", fix="put the file itself there")
        found[name] = path
    return found


def _instruction(folder: Path, name: str) -> str:
    """The pair's own instruction, else the common one, on one line; empty if there is neither."""
    for path in (folder / f"{name}.txt", folder / COMMON_INSTRUCTION):
        if path.is_file():
            try:
                return " ".join(path.read_text(encoding="utf-8-sig").split())
            except UnicodeDecodeError as error:
                raise UserError(
                    f"is not UTF-8 text ({error.reason} at byte {error.start})", where=f"instruction {str(path)!r}", fix="save it as UTF-8"
                ) from None
    return ""


def abbreviate(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
