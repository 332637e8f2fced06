"""Manifests of paired edits: a row each of JSON lines, a JSON array, CSV or Parquet; paths are absolute, relative to the manifest, or URLs.

A path names a video file, a folder of frames or (reference, mask) a single image. `target` and `mask` are optional, and so is
`reference` if there is a target: it defaults to the target's first frame, as in the paper's training.
"""

import difflib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..media.fit import check_frames, fit_clip, fit_mask, fit_reference, resize_and_crop, trim_clip
from ..media.images import read_image, write_frames
from ..media.paths import atomic_folder, check_input, check_output_folder, numbered_name
from ..media.remote import check_url, is_url, local_copy
from ..media.video import DEFAULT_FPS, read_clip, stream_clip
from ..types import Clip, EditRequest, Keyframe, PairedEdit
from .pace import Pace
from .tables import Row, read_table, write_table

PATH_KEYS = ("source", "reference", "target", "mask")
TEXT_KEYS = ("instruction", "name", "kind", "edit", "colour")
KEYS = (*PATH_KEYS, *TEXT_KEYS, "fps", "keyframes")
REQUIRED_KEYS = ("source", "instruction")
ALIASES = {  # columns of other tables that can mean nothing else -> ours
    "source_video": "source",
    "source_path": "source",
    "source_video_path": "source",
    "original_video": "source",
    "target_video": "target",
    "target_path": "target",
    "target_video_path": "target",
    "edited_video": "target",
    "reference_image": "reference",
    "mask_video": "mask",
    "prompt": "instruction",
}


@dataclass(frozen=True)
class ManifestEntry:
    """One line of a manifest. Paths are resolved; a `str` is a URL."""

    source: Path | str
    reference: Path | str | None  # None: the target's first frame
    instruction: str
    target: Path | str | None = None
    mask: Path | str | None = None  # a folder of images or a video, white inside the edit; a single image applies to all frames
    name: str = ""
    kind: str = ""  # group of the clip in reports
    edit: str = ""  # kind of edit, also a group in reports
    colour: str = ""  # #rrggbb of the one edited object after the edit (before it, if removed); lets reports measure its position and shape
    fps: float = DEFAULT_FPS  # frame rate, for folders of frames
    keyframes: tuple[tuple[int, Path | str], ...] = ()  # number and image of further edited frames; a JSON object {"40": "image.png"}
    first_frame: bool = field(default=False, repr=False)  # the reference is a video, whose first frame is meant; no key of a manifest
    problem: str = field(default="", repr=False)  # of a row that is left out, why; nothing else of it is known than its location, the name

    @property
    def title(self) -> str:
        """The entry's name in messages."""
        return self.name or str(self.source)

    def check(self) -> None:
        """Raises UserError for a row that is left out."""
        if self.problem:
            raise UserError(self.problem)


def read_manifest(
    location: str | os.PathLike, required: Sequence[str] = REQUIRED_KEYS, allow_empty_instruction: bool = True, *, strict: bool = True, absolute: bool = True
) -> list[ManifestEntry]:
    """Reads a manifest -> one entry a row. Raises UserError with the line, column and key for anything missing, misspelt or outside the manifest's folder.

    Without `strict` such a row becomes an entry with a `problem`, which is raised when its media are read; the manifest is an error if all
    rows are such. Media behind URLs are checked only when they are read. `required` are the keys that every row must have; fewer than the
    default allow rows that are not pairs. Without `allow_empty_instruction` an empty instruction is an error, without `absolute` an
    absolute path. Other columns are ignored, with a warning.
    """
    rows = read_table(location, "manifest")
    entries, others = [], dict.fromkeys(key for row in rows for key in row.values if key not in KEYS and key not in ALIASES)
    for row in rows:
        try:
            entry = _entry(row, location, required, absolute)
            if not allow_empty_instruction and not entry.instruction.strip():
                raise UserError("the instruction is empty", where=row.at("instruction"), fix="say what the edit is, or leave the line out")
        except UserError as error:
            if strict:
                raise
            entry = ManifestEntry("", None, "", name=row.where, problem=str(error))
        entries.append(entry)
    if all(entry.problem for entry in entries):
        raise UserError("none of the rows can be used", where=f"manifest {str(location)!r}", got=f"{len(rows)}, the first of which says: {entries[0].problem}")
    unknown = [key for key in others if not _misspelt(key)]
    if unknown:
        warnings.warn(f"manifest {str(location)!r}: these columns are not used: {', '.join(unknown[:8])}; known are {', '.join(KEYS)}", stacklevel=2)
    return entries


def write_manifest(path: str | os.PathLike, entries: Iterable[ManifestEntry]) -> Path:
    """Writes a .jsonl or .parquet atomically, without moving media; those outside the manifest's folder get absolute paths. Raises UserError."""
    folder, rows = Path(path).absolute().parent, []
    for entry in entries:
        values = {key: value for key, value in asdict(entry).items() if key in KEYS and value not in ("", None, ())}
        row = {key: _relative(value, folder) if key in PATH_KEYS else value for key, value in values.items()}
        if entry.keyframes:
            row["keyframes"] = {str(number): _relative(image, folder) for number, image in entry.keyframes}
        rows.append(row)
    return write_table(path, rows)


def read_source(entry: ManifestEntry, num_frames: int | None = None) -> Clip:
    """Reads the source without fitting it, at most `num_frames` frames."""
    entry.check()
    return read_clip(local_copy(entry.source, "source"), what="source", fps=entry.fps, num_frames=num_frames)


def load_entry(
    entry: ManifestEntry, size: tuple[int, int] | None = None, num_frames: int | None = None, source: Clip | None = None, full_size: bool = False
) -> PairedEdit:
    """Reads and fits an entry's media; size (width, height) and num_frames as in `fit_clip`; `source`: the clip, if already read.

    Target and mask are read at the source's pace, see pace.py.
    `full_size` keeps the source's own size, to which the rest is fitted; only the number of frames is made to fit.
    """
    entry.check()
    clip, where = source or read_source(entry, num_frames), f"source {str(entry.source)!r}"
    source = trim_clip(clip, num_frames, where) if full_size else fit_clip(clip, size, num_frames, where)
    source_size = clip.frames.shape[2], clip.frames.shape[1]
    count, height, width = source.frames.shape[:3]
    size = (width, height)
    target: Tensor | None = None
    mask: Tensor | None = None
    pace = Pace.of(local_copy(entry.source, "source"), entry.fps, count, num_frames, source_size)
    if entry.target is not None:
        frames = pace.read(local_copy(entry.target, "target"), "target", str(entry.target))
        target = resize_and_crop(check_frames(frames, f"target {str(entry.target)!r}"), size)
    if entry.reference is not None:
        reference = fit_reference(read_reference(entry), size, f"reference {str(entry.reference)!r}", source_size)
    elif target is not None:
        reference = target[0].clone()
    else:
        raise UserError("there is neither a reference nor a target", where=entry.title)
    keyframes = read_keyframes(entry, size, source_size)
    if entry.mask is not None:
        mask = fit_mask(pace.read(local_copy(entry.mask, "mask"), "mask", str(entry.mask), may_be_still=True), size).expand(count, -1, -1)
    colour: tuple[float, float, float] | None = None
    if entry.colour:
        red, green, blue = bytes.fromhex(entry.colour[1:])
        colour = (red / 255, green / 255, blue / 255)
    return PairedEdit(EditRequest(source, reference, entry.instruction, keyframes), target, mask, entry.name, colour)


def read_reference(entry: ManifestEntry) -> Tensor:
    """The entry's reference, (H, W, 3)."""
    assert entry.reference is not None
    path = local_copy(entry.reference, "reference")
    if entry.first_frame:
        return next(iter(stream_clip(path, what="reference", num_frames=1)))
    return read_image(path, what="reference")


def read_keyframes(entry: ManifestEntry, size: tuple[int, int], source_size: tuple[int, int] | None = None) -> tuple[Keyframe, ...]:
    """Reads the entry's keyframes, in the order of their numbers, and fits them as fit_reference does."""
    return tuple(
        Keyframe(number, fit_reference(read_image(local_copy(path, what), what=what), size, f"{what} {str(path)!r}", source_size))
        for number, path in sorted(entry.keyframes, key=lambda item: item[0])
        for what in [f"keyframe {number}"]
    )


@dataclass(frozen=True)
class ManifestPairs(Sequence[PairedEdit]):
    """The paired edits of a manifest, each read from disk when it is accessed."""

    entries: Sequence[ManifestEntry]
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    full_size: bool = False  # keep the sources' own sizes

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> PairedEdit:  # type: ignore[override]  # slices are not supported
        return load_entry(self.entries[index], self.size, self.num_frames, full_size=self.full_size)


def export_pairs(pairs: Iterable[tuple[PairedEdit, Mapping[str, str]]], folder: str | os.PathLike) -> Path:
    """Writes paired edits as folders of PNG frames, with their manifest pairs.jsonl -> the manifest's path.

    Lossless at 8 bits. The mapping holds a pair's `kind` and `edit`, if known. Other pairs that the folder already holds stay there.
    Raises UserError if the folder cannot be written.
    """
    folder = check_output_folder(folder, "output")
    with atomic_folder(folder) as partial:
        lines = [_write_pair(pair, labels, partial, index) for index, (pair, labels) in enumerate(pairs)]
        write_table(partial / "pairs.jsonl", lines)
    return folder / "pairs.jsonl"


def _write_pair(pair: PairedEdit, labels: Mapping[str, str], folder: Path, index: int) -> dict:
    stem = numbered_name(index, pair.name, 3)
    request = pair.request
    write_frames(folder / stem / "source", request.source.frames)
    write_frames(folder / stem / "reference", request.reference[None])
    line: dict[str, Any] = {
        "name": pair.name or stem,
        **labels,
        "source": f"{stem}/source",
        "reference": f"{stem}/reference/00000.png",
        "instruction": request.instruction,
        "fps": request.source.fps,
    }
    if request.keyframes:
        names = {keyframe.number: f"{stem}/keyframe_{keyframe.number:05d}" for keyframe in request.keyframes}
        for keyframe in request.keyframes:
            write_frames(folder / names[keyframe.number], keyframe.image[None])
        line["keyframes"] = {str(number): f"{name}/00000.png" for number, name in names.items()}
    if pair.colour is not None:
        line["colour"] = "#" + bytes(round(255 * value) for value in pair.colour).hex()
    for key, frames in (("target", pair.target), ("mask", pair.mask)):
        if frames is not None:
            write_frames(folder / stem / key, frames)
            line[key] = f"{stem}/{key}"
    return line


def _entry(row: Row, manifest: str | os.PathLike, required: Sequence[str], absolute: bool) -> ManifestEntry:
    if row.problem:
        raise UserError(row.problem)
    values: dict[str, Any] = {}
    for key, value in row.values.items():
        if _misspelt(key):
            raise UserError(f"unknown key {key!r}", where=row.at(key), expected=", ".join(KEYS))
        known = ALIASES.get(key, key)
        if known in KEYS and value is not None and (value != "" or known in TEXT_KEYS):
            if known in values:
                raise UserError(f"two keys say what the {known} is", where=row.at(key), got=", ".join(k for k in row.values if ALIASES.get(k, k) == known))
            values[known] = value
    if isinstance(values.get("fps"), str):
        values["fps"] = _parse(float, values["fps"])
    if isinstance(values.get("keyframes"), str):
        values["keyframes"] = _parse(json.loads, values["keyframes"])
    for key in required:
        if values.get(key) is None:
            raise UserError(f"the key {key!r} is missing", where=row.at(key))
    if "instruction" in required and values.get("reference") is None and values.get("target") is None:
        raise UserError("the key 'reference' is missing", where=row.where, fix="a line with a target may leave it out")
    fields = {key: value for key, value in values.items() if value is not None}
    for key in fields.keys() - {"fps", "keyframes"}:
        if not isinstance(fields[key], str):
            raise UserError(f"the key {key!r} is not text", where=row.at(key), got=json.dumps(fields[key], default=str)[:80])
    if not re.fullmatch("(#[0-9a-fA-F]{6})?", fields.get("colour", "")):
        raise UserError("the key 'colour' is not a colour", where=row.at("colour"), got=fields["colour"][:80], expected="#rrggbb")
    fps = fields.get("fps", DEFAULT_FPS)
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1000:
        raise UserError("the key 'fps' is not a frame rate", where=row.at("fps"), got=json.dumps(fps, default=str)[:80], expected="more than 0, less than 1000")
    for key in (key for key in PATH_KEYS if key in fields):
        fields[key] = _resolve(fields[key], manifest, f"{row.at(key)}: the key {key!r}", absolute)
    fields["keyframes"] = _keyframes(fields.get("keyframes", {}), row, manifest, absolute)
    return ManifestEntry(**{"reference": None, "instruction": "", **fields})


def _misspelt(key: str) -> bool:
    """Whether a key is not known, but nearly."""
    return key not in KEYS and key not in ALIASES and bool(difflib.get_close_matches(key, KEYS, cutoff=0.85))


def _parse(read: Callable[[str], Any], text: str) -> Any:
    """A cell of CSV as the value that it stands for, or else the text itself."""
    try:
        return read(text)
    except ValueError:
        return text


def _keyframes(values: Any, row: Row, manifest: str | os.PathLike, absolute: bool) -> tuple[tuple[int, Path | str], ...]:
    """A JSON object of frame numbers and paths -> numbers and resolved paths. A table of columns has null for the numbers that a row lacks."""
    if not isinstance(values, dict):
        raise UserError("the key 'keyframes' is no object", where=row.at("keyframes"), got=json.dumps(values, default=str)[:80], expected='{"40": "image.png"}')
    found = []
    for number, path in values.items():
        if path is None:
            continue
        if not re.fullmatch("[0-9]{1,9}", number) or not isinstance(path, str):
            got = json.dumps({number: path}, default=str)[:80]
            raise UserError("a keyframe is the number of a frame and an image", where=row.at("keyframes"), got=got, expected='"40": "image.png"')
        found.append((int(number), _resolve(path, manifest, f"{row.at('keyframes')}: keyframe {number}", absolute)))
    return tuple(found)


def _resolve(text: str, manifest: str | os.PathLike, where: str, absolute: bool) -> Path | str:
    """Resolves a URL, an absolute path in a local manifest, or a path relative to the manifest and inside its folder even if links are followed.

    Raises UserError.
    """
    if is_url(text):
        return check_url(text, where)
    if absolute and not is_url(manifest) and os.path.isabs(text):
        try:
            return check_input(text, "path")
        except UserError as error:
            raise UserError(str(error), where=where) from None
    if re.match(r"[A-Za-z]:", text) or "\\" in text or text.startswith("/"):
        raise UserError("not a path relative to the manifest", where=where, got=repr(text), fix="write folder/file with /")
    if is_url(manifest):
        if not text or "\0" in text or ".." in PurePosixPath(text).parts:
            raise UserError("leads outside the manifest's folder", where=where, got=repr(text), fix="put the file under the manifest's folder")
        return check_url(f"{manifest.rpartition('/')[0]}/{text}", where)
    try:
        path = check_input(Path(manifest).parent / text, "path")
    except UserError as error:
        raise UserError(str(error), where=where) from None
    if not path.resolve().is_relative_to(Path(manifest).parent.resolve()):
        raise UserError("leads outside the manifest's folder", where=where, got=repr(text), fix="put the file under the manifest's folder")
    return path


def _relative(location: Path | str, folder: Path) -> str:
    """The location as a manifest in that folder names it."""
    if is_url(location):
        return location
    absolute = Path(os.path.abspath(location))
    return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)
