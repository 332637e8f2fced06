"""Manifests of paired edits: one JSON object a line, paths relative to the manifest.

A path names a video file, a folder of frames or (reference, mask) one image. `target` and `mask` may be left out, and beside
a target the `reference` too: it then is the target's first frame, as in the paper's training.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .files import check_input, check_output_folder, written_beside, written_folder
from .pixels import fit_clip, fit_mask, fit_reference
from .types import Clip, EditRequest, PairedEdit
from .video import DEFAULT_FPS, read_clip, read_image, write_frames

PATH_KEYS = ("source", "reference", "target", "mask")
TEXT_KEYS = ("instruction", "name", "kind", "edit")
REQUIRED_KEYS = ("source", "instruction")


@dataclass(frozen=True)
class ManifestEntry:
    """One line of a manifest; its paths are usable as they stand."""

    source: Path
    reference: Path | None  # None: the target's first frame
    instruction: str
    target: Path | None = None
    mask: Path | None = None  # a folder of images or a video, white where the edit is; an image stands for every frame
    name: str = ""
    kind: str = ""  # groups clips in reports
    edit: str = ""
    fps: float = DEFAULT_FPS  # of folders of frames


def read_manifest(path: str | os.PathLike) -> list[ManifestEntry]:
    """Raises UserError with the line's number and key for anything missing, unknown or outside the manifest's folder."""
    path = check_input(path, "manifest")
    if path.is_dir():
        raise UserError("is a folder", where=f"manifest {str(path)!r}", expected="a .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason} at byte {error.start})", where=f"manifest {str(path)!r}") from None
    entries = [_entry(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not entries:
        raise UserError("holds no lines", where=f"manifest {str(path)!r}", expected="one JSON object a line")
    return entries


def load_entry(entry: ManifestEntry, size: tuple[int, int] | None = None, num_frames: int | None = None) -> PairedEdit:
    """Reads and fits what the entry names; size (width, height) and num_frames as in `fit_clip`."""
    clip = read_clip(entry.source, what="source", fps=entry.fps, num_frames=num_frames)
    source, source_size = fit_clip(clip, size, num_frames, f"source {str(entry.source)!r}"), (clip.frames.shape[2], clip.frames.shape[1])
    count, height, width = source.frames.shape[:3]
    size = (width, height)
    target = mask = None
    if entry.target is not None:
        clip = _same_length(read_clip(entry.target, what="target", fps=entry.fps, num_frames=count), entry.target, "target", count)
        target = fit_clip(clip, size, count, f"target {str(entry.target)!r}").frames
    if entry.reference is None:
        reference = target[0].clone()
    else:
        reference = fit_reference(read_image(entry.reference, what="reference"), size, f"reference {str(entry.reference)!r}", source_size)
    if entry.mask is not None:
        clip = read_clip(entry.mask, what="mask", fps=entry.fps, num_frames=count)
        still = len(clip.frames) == 1
        mask = fit_mask((clip if still else _same_length(clip, entry.mask, "mask", count)).frames, size)
        mask = mask.expand(count, -1, -1) if still else mask
    return PairedEdit(EditRequest(source, reference, entry.instruction), target, mask, entry.name)


@dataclass(frozen=True)
class ManifestPairs(Sequence[PairedEdit]):
    """The paired edits of a manifest, read from disk one at a time as they are asked for."""

    entries: Sequence[ManifestEntry]
    size: tuple[int, int] | None = None
    num_frames: int | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PairedEdit:
        return load_entry(self.entries[index], self.size, self.num_frames)


def export_pairs(pairs: Iterable[tuple[PairedEdit, Mapping[str, str]]], folder: str | os.PathLike) -> Path:
    """Writes paired edits as folders of PNG frames with a pairs.jsonl beside them -> the manifest's path.

    What is read back equals what was written, at 8 bits. The mapping holds a pair's `kind` and `edit`, where known.
    Pairs of the folder that are not written again stay. Raises UserError where the folder cannot be written.
    """
    folder = check_output_folder(folder, "output")
    with written_folder(folder) as partial:
        lines = [_write_pair(pair, labels, partial, index) for index, (pair, labels) in enumerate(pairs)]
        with written_beside(partial / "pairs.jsonl") as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder / "pairs.jsonl"


def _write_pair(pair: PairedEdit, labels: Mapping[str, str], folder: Path, index: int) -> dict:
    stem = "-".join([f"{index:03d}", *re.findall(r"[A-Za-z0-9]+", pair.name)])[:80]
    request = pair.request
    write_frames(folder / stem / "source", request.source.frames)
    write_frames(folder / stem / "reference", request.reference[None])
    line = {"name": pair.name or stem, **labels, "source": f"{stem}/source", "reference": f"{stem}/reference/00000.png",
            "instruction": request.instruction, "fps": request.source.fps}
    for key, frames in (("target", pair.target), ("mask", pair.mask)):
        if frames is not None:
            write_frames(folder / stem / key, frames)
            line[key] = f"{stem}/{key}"
    return line


def _same_length(clip: Clip, path: Path, what: str, count: int) -> Clip:
    if len(clip.frames) < count:
        raise UserError(f"the {what} is shorter than the source", where=f"{what} {str(path)!r}",
                        got=f"{len(clip.frames)} frames", expected=f"{count}")
    return clip


def _entry(line: str, manifest: Path, number: int) -> ManifestEntry:
    where = f"{manifest}:{number}"
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"not JSON ({error})", where=where) from None
    if not isinstance(values, dict):
        raise UserError("not a JSON object", where=where, got=type(values).__name__)
    known = (*PATH_KEYS, *TEXT_KEYS, "fps")
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {key!r}", where=where, expected=", ".join(known))
    for key in REQUIRED_KEYS:
        if values.get(key) is None:
            raise UserError(f"the key {key!r} is missing", where=where)
    if values.get("reference") is None and values.get("target") is None:
        raise UserError("the key 'reference' is missing", where=where, fix="a line with a target may leave it out")
    fields = {key: value for key, value in values.items() if value is not None}
    for key in fields.keys() - {"fps"}:
        if not isinstance(fields[key], str):
            raise UserError(f"the key {key!r} is not text", where=where, got=json.dumps(fields[key])[:80])
    fps = fields.get("fps", DEFAULT_FPS)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1000:
        raise UserError("the key 'fps' is not a frame rate", where=where, got=json.dumps(fps), expected="more than 0, less than 1000")
    for key in fields.keys() & set(PATH_KEYS):
        fields[key] = _inside(fields[key], manifest, f"{where}: the key {key!r}")
    return ManifestEntry(**{"reference": None, **fields})


def _inside(text: str, manifest: Path, where: str) -> Path:
    """A relative path under the manifest's folder, links followed. Raises UserError."""
    if re.match(r"[A-Za-z]:", text) or "\\" in text or text.startswith("/"):
        raise UserError("not a path relative to the manifest", where=where, got=repr(text), fix="write folder/file with /")
    try:
        path = check_input(manifest.parent / text, "path")
    except UserError as error:
        raise UserError(str(error), where=where) from None
    if not path.resolve().is_relative_to(manifest.parent.resolve()):
        raise UserError("leads outside the manifest's folder", where=where, got=repr(text), fix="put the file under the manifest's folder")
    return path
