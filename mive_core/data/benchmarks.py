"""Reads published benchmarks of video editing, as unpacked on disk, as manifest entries without targets.

openve, OpenVE-Bench (huggingface.co/datasets/Lewandofski/OpenVE-Bench; read by github.com/showlab/Kiwi-Edit, test_benchmark.py):
    benchmark_videos.csv   columns edited_type, prompt, original_video; the latter begins with the folder's own name
    videos/
refvie, RefVIE-Bench (huggingface.co/datasets/linyq/RefVIE-Bench; the same file of Kiwi-Edit and its eval_refvie_gemini.py):
    refvie_bench.yaml      a list of src_video, ref_img, instruction and edit_type, subject or background; paths are relative to the folder
    source_videos/, ref_images/
editverse, EditVerseBench (huggingface.co/datasets/sooyek/EditVerseBench; README and automatic_evaluation/ of github.com/adobe-research/EditVerse):
    test.json              or EditVerseBench.json; number -> "<text>" with marks such as <video1>, "<video1>", "type"; paths relative to it
    videos/, edited_first_frame/, ...
five, FiVE-Bench (huggingface.co/datasets/LIMinghan/FiVE-Fine-Grained-Video-Editing-Benchmark; README, evaluation/evaluate.py and
models/wan-edit/edit.py of github.com/Harvard-AI-and-Robotics-Lab/FiVE-Bench):
    edit_prompt/edit1_FiVE.json ... edit6_FiVE.json   lists of video_name, source_prompt, target_prompt and, where there is one, instruction
    images/NAME/00001.jpg or videos/NAME.mp4, bmasks/NAME/00001.jpg

A RefVIE reference shows a thing or a place, not the edited first frame that MiVE reads. What EditVerse's README does not say, which key of an
entry names its edited first frame: any whose path lies in that folder is taken, else the folder's file of the clip's name or number.
"""

import csv
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..media.images import IMAGE_SUFFIXES
from ..media.paths import check_input
from .folder import abbreviate
from .manifest import ManifestEntry

FIVE_KINDS = ("rigid replacement", "non-rigid replacement", "colour", "material", "addition", "removal")  # edit1 to edit6
FIRST_FRAMES, FIRST_FRAME_SUFFIXES = "edited_first_frame", (*IMAGE_SUFFIXES, ".mp4")
EDITED_FRAME, SOURCE_FRAME = "edited first frame", "source's first frame"  # the references that a report tells apart


def read_benchmark(name: str, folder: str | Path) -> list[ManifestEntry]:
    """The clips of a benchmark, with its own reference images and masks, if any; `kind` is its kind of edit.

    Raises UserError for a folder of another layout, and for missing files: which and how many.
    """
    folder = check_input(folder, "folder")
    if not folder.is_dir():
        raise UserError("is no folder", where=f"benchmark {str(folder)!r}", expected=f"the unpacked files of {name}")
    entries = READERS[name](folder)
    if not entries:
        raise UserError("the benchmark lists no clips", where=folder)
    wanted = dict.fromkeys(path for entry in entries for path in _files(entry))
    missing = [path.relative_to(folder).as_posix() for path in wanted if not path.exists()]
    if missing:
        raise UserError(
            "files of the benchmark are missing", where=folder, got=f"{len(missing)} of {len(wanted)}: {abbreviate(missing)}", fix="download and unpack them"
        )
    return list(map(_marked, entries))


def edit_requests(name: str, entries: Sequence[ManifestEntry], references: str | Path | None = None) -> list[ManifestEntry]:
    """The clips with the first frames that MiVE edits by: NAME.png in the folder `references`, else the benchmark's own, else the source's, unedited.

    Warns of the latter. Raises UserError for a folder without any image of a clip's name.
    """
    given: dict[str, Path] = {}
    if references is not None:
        folder = check_input(references, "references")
        given = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES} if folder.is_dir() else {}
        if not given.keys() & {entry.name for entry in entries}:
            found, example = abbreviate(sorted(given)) or "none", f"{entries[0].name}.png"
            raise UserError("no image has the name of a clip", where=f"references {str(folder)!r}", got=found, expected=example)
    own = {entry.name: entry.reference for entry in entries if name != "refvie" and entry.reference is not None}
    edited = own | given
    without = [entry.name for entry in entries if entry.name not in edited]
    if without:
        warnings.warn(
            f"{len(without)} of {len(entries)} clips have no edited first frame and are edited by the words and the unedited one: {abbreviate(without)}; "
            "--references DIR takes a NAME.png for each",
            stacklevel=2,
        )
    return [_marked(replace(entry, reference=edited.get(entry.name, entry.source))) for entry in entries]


def reference_kinds(entries: Sequence[ManifestEntry]) -> list[str]:
    """EDITED_FRAME or SOURCE_FRAME of each of the edit_requests."""
    return [SOURCE_FRAME if entry.reference == entry.source else EDITED_FRAME for entry in entries]


def read_openve(folder: Path) -> list[ManifestEntry]:
    table = _text(folder, "benchmark_videos.csv")
    rows = csv.DictReader(io.StringIO(table, newline=""))
    entries = []
    for row in rows:
        kind, prompt, video = _values(row, ("edited_type", "prompt", "original_video"), f"benchmark_videos.csv:{rows.line_num}")
        places = [_inside(folder, *parts) for parts in ([video], Path(video).parts[1:], ["videos", Path(video).name])]
        source = next((place for place in places if place.is_file()), places[-1])
        entries.append(ManifestEntry(source, None, prompt, name=source.stem, kind=kind))
    return _distinct(entries)


def read_refvie(folder: Path) -> list[ManifestEntry]:
    try:
        items = yaml.safe_load(_text(folder, "refvie_bench.yaml"))
    except yaml.YAMLError as error:
        raise UserError(f"is no YAML ({error})", where=folder / "refvie_bench.yaml") from None
    entries = []
    for number, item in enumerate(_list(items, "refvie_bench.yaml")):
        video, image, instruction, kind = _values(item, ("src_video", "ref_img", "instruction", "edit_type"), f"refvie_bench.yaml[{number}]")
        entries.append(ManifestEntry(_inside(folder, video), _inside(folder, image), instruction, name=f"{number:03d}_{Path(video).stem}", kind=kind))
    return entries


def read_editverse(folder: Path) -> list[ManifestEntry]:
    folder = folder / "EditVerseBench" if (folder / "EditVerseBench").is_dir() else folder
    file = "EditVerseBench.json" if (folder / "EditVerseBench.json").exists() else "test.json"
    items = _json(folder, file)
    if not isinstance(items, dict):
        raise UserError("holds no clips by number", where=folder / file, got=type(items).__name__, expected='{"0": {"<text>": ...}}')
    entries = []
    for number, item in items.items():
        words, video, kind = _values(item, ("<text>", "<video1>", "type"), f"{file}[{number}]")
        instruction = " ".join(re.sub(r"<(video|image)\d+>", " ", words).split())
        named = [_inside(folder, value) for value in item.values() if isinstance(value, str) and Path(value).parts[:1] == (FIRST_FRAMES,)]
        stems = (Path(video).stem, number)
        found = [path for stem in stems for suffix in FIRST_FRAME_SUFFIXES if (path := folder / FIRST_FRAMES / f"{stem}{suffix}").exists()]
        entries.append(ManifestEntry(_inside(folder, video), next(iter(named or found), None), instruction, name=number, kind=kind))
    return entries


def read_five(folder: Path) -> list[ManifestEntry]:
    entries = []
    for number, kind in enumerate(FIVE_KINDS, 1):
        file = f"edit_prompt/edit{number}_FiVE.json"
        for index, item in enumerate(_list(_json(folder, file), file)):
            video, prompt = _values(item, ("video_name", "target_prompt"), f"{file}[{index}]")
            images, masks = _inside(folder, "images", video), _inside(folder, "bmasks", video)
            source = images if images.exists() else _inside(folder, "videos", f"{video}.mp4")
            instruction = item.get("instruction")
            if not isinstance(instruction, str) or not instruction.strip():
                instruction = prompt.replace("[", "").replace("]", "")
            entries.append(ManifestEntry(source, None, instruction, mask=masks, name=f"{video}_edit{number}", kind=kind))
    return _distinct(entries)


READERS: dict[str, Callable[[Path], list[ManifestEntry]]] = {"openve": read_openve, "refvie": read_refvie, "editverse": read_editverse, "five": read_five}


def _marked(entry: ManifestEntry) -> ManifestEntry:
    """The entry, with `first_frame` set if its reference is no image."""
    return replace(entry, first_frame=entry.reference is not None and Path(str(entry.reference)).suffix.lower() not in IMAGE_SUFFIXES)


def _files(entry: ManifestEntry) -> list[Path]:
    """The files that an entry needs; of a folder of masks, one for each of the source's frames."""
    files = [path for path in (entry.source, entry.reference, entry.mask) if isinstance(path, Path)]
    source, mask = entry.source, entry.mask
    if isinstance(source, Path) and isinstance(mask, Path) and source.is_dir() and mask.is_dir():
        files += [mask / frame.name for frame in sorted(source.iterdir()) if frame.suffix.lower() in IMAGE_SUFFIXES]
    return files


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        found = abbreviate(sorted(path.name for path in folder.iterdir()))
        raise UserError(f"the folder holds no {name}", where=folder, got=found or "an empty folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=folder / name) from None


def _json(folder: Path, name: str) -> Any:
    try:
        return json.loads(_text(folder, name))
    except json.JSONDecodeError as error:
        raise UserError(f"is no JSON ({error})", where=folder / name) from None


def _list(items: Any, where: str) -> list:
    if not isinstance(items, list):
        raise UserError("holds no list of clips", where=where, got=type(items).__name__)
    return items


def _values(item: Any, keys: Sequence[str], where: str) -> list[str]:
    """The texts of these keys. Raises UserError for one that is missing or empty."""
    values = [item.get(key) if isinstance(item, dict) else None for key in keys]
    for key, value in zip(keys, values):
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"the key {key!r} is missing", where=where, got=repr(value), expected="text")
    return [value.strip() for value in values if isinstance(value, str)]


def _inside(folder: Path, *parts: str) -> Path:
    """A path below the folder. Raises UserError for one that leads outside."""
    path = folder.joinpath(*parts)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError("leads outside the benchmark's folder", where=folder, got="/".join(parts))
    return path


def _distinct(entries: list[ManifestEntry]) -> list[ManifestEntry]:
    """Numbers the later of entries with one name: bus, bus_2, bus_3."""
    seen: dict[str, int] = {}
    numbered = []
    for entry in entries:
        count = seen[entry.name] = seen.get(entry.name, 0) + 1
        numbered.append(replace(entry, name=f"{entry.name}_{count}") if count > 1 else entry)
    return numbered
