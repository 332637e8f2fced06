"""Portrait pairs: composites a person from one clip over another clip, which gives edits with a known result (paper, training).

A person's clip and a background give three pairs: the person is removed, the person is added, the background is replaced. The masks are
exact: outside of them, source and target have the same pixels.

F frames of H x W pixels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..media.encode import VIDEO_SUFFIXES
from ..media.fit import fit_clip, resize_and_crop, valid_num_frames
from ..media.images import write_frames
from ..media.paths import atomic_folder, check_input, check_output_folder, numbered_name, remove_partial_files
from ..media.remote import is_url, local_copy
from ..media.video import read_clip, write_video
from ..types import Clip
from .executor import Executor
from .journal import Outcome, Task, fingerprint, run_resumable
from .manifest import ManifestEntry, read_manifest, read_source, write_manifest
from .segment_person import Segmenter

JOURNAL, MANIFEST = "composed.jsonl", "pairs.jsonl"
STORES = ("video", "frames")  # high-quality H.264, or PNG, which takes 20 times the bytes
ALPHA_TOLERANCE = 0.05  # alpha this close to 0 or 1 becomes 0 or 1, which removes compression artefacts of the mask
MIN_PERSON, MAX_PERSON = 0.01, 0.9  # share of a clip's pixels that a person may cover
INSTRUCTIONS = {
    "remove": ("remove the person", "take the person out of the video", "make the person disappear", "erase the person and keep the background as it is"),
    "add": ("add the person", "put the person of the reference into the scene", "let a person appear in front, as the reference shows"),
    "background": ("replace the background", "put the person in front of the other background", "keep the person and change everything behind"),
}
BACKGROUND_INSTRUCTIONS = ("replace the background with {}", "put the person in front of {}", "change everything behind the person to {}")


@dataclass(frozen=True)
class ComposeSettings:
    """Settings of the pairs."""

    size: tuple[int, int] | None = None  # width, height; None: the fitted size of the person's clip
    num_frames: int | None = None
    seed: int = 0  # of the choice of background and instruction
    store: str = "video"


@dataclass(frozen=True)
class Portrait:
    """One person over one background."""

    number: int
    person: ManifestEntry
    background: ManifestEntry  # its instruction, if any, describes what it shows


@dataclass(frozen=True)
class ComposeWorker:
    """Writes each portrait's clips and masks into a folder of its own."""

    segmenter: Segmenter | None  # None: all clips of persons have masks
    folder: Path
    settings: ComposeSettings

    def read(self, item: Portrait) -> tuple[Clip, Clip, Clip | None]:
        person = read_source(item.person, self.settings.num_frames)
        mask = None
        if item.person.mask is not None:
            mask = read_clip(local_copy(item.person.mask, "mask"), what="mask", num_frames=len(person.frames))
            if len(mask.frames) not in (1, len(person.frames)):
                raise UserError(
                    "the mask and the person's clip differ in length",
                    where=f"mask {str(item.person.mask)!r}",
                    got=f"{len(mask.frames)} frames",
                    expected=f"{len(person.frames)}, or one image",
                )
        return person, read_source(item.background, len(person.frames)), mask

    def work(self, item: Portrait, read: tuple[Clip, Clip, Clip | None]) -> dict:
        person, background, alpha = self.fit(item, *read)
        composite = over(person.frames, background.frames, alpha)
        clips = {"original": person.frames, "background": background.frames, "composite": composite}
        name = numbered_name(item.number, item.person.name or Path(str(item.person.source)).stem, 6)
        with atomic_folder(self.folder / name) as folder:
            for kind, frames in clips.items():
                if self.settings.store == "frames":
                    write_frames(folder / kind, frames)
                else:
                    write_video(folder / f"{kind}.mp4", Clip(frames, person.fps))
            write_frames(folder / "person", alpha > 0)
            write_frames(folder / "surroundings", alpha < 1)
        return {"folder": name, "fps": person.fps, "words": choose_instructions(item, self.settings.seed)}

    def fit(self, item: Portrait, person: Clip, background: Clip, mask: Clip | None) -> tuple[Clip, Clip, Tensor]:
        """Fits both clips to one size and length -> the clips and the person's alpha (F, H, W). Raises UserError for too little or too much person."""
        person = fit_clip(person, self.settings.size, self.settings.num_frames, f"source {item.person.title!r}")
        size = person.frames.shape[2], person.frames.shape[1]
        count = self.settings.num_frames or min(len(person.frames), valid_num_frames(len(background.frames)))
        person, background = Clip(person.frames[:count], person.fps), fit_clip(background, size, count, f"background {item.background.title!r}")
        if mask is None:
            alpha = self.segmenter.alpha(person.frames)  # type: ignore[union-attr]  # compose() demands a segmenter if a mask is missing
        else:
            alpha = resize_and_crop(mask.frames[:count], size).mean(dim=-1).expand(count, -1, -1)
        alpha = torch.where(alpha < ALPHA_TOLERANCE, 0.0, torch.where(alpha > 1 - ALPHA_TOLERANCE, 1.0, alpha))
        share = alpha.mean().item()
        if not MIN_PERSON <= share <= MAX_PERSON:
            raise UserError(
                "there is no person to be cut out", where=item.person.title, got=f"{share:.1%} of the pixels", expected=f"{MIN_PERSON:.0%} to {MAX_PERSON:.0%}"
            )
        return person, background, alpha


def compose(
    people: Sequence[ManifestEntry],
    backgrounds: Sequence[ManifestEntry],
    folder: str | Path,
    settings: ComposeSettings = ComposeSettings(),
    *,
    load: Callable[[], Segmenter] | None = None,
    model_id: object = "",
    executor: Executor = Executor(),
) -> tuple[list[Outcome], Path]:
    """Composes the pairs that are missing -> each person's outcome, and the manifest of all pairs.

    `load` returns the model that segments persons without a mask; `model_id` identifies it: if that changes, the work is done again.
    Raises UserError.
    """
    folder = check_output_folder(folder, "output")
    unmasked = [entry.title for entry in people if entry.mask is None]
    if unmasked and load is None:
        raise UserError("a person's clip has no mask", got=unmasked[0], fix="name a mask in its line, or a model that finds persons with --segmenter")
    folder.mkdir(parents=True, exist_ok=True)
    dependencies = (asdict(settings), model_id if unmasked else "")
    portraits = [Portrait(number, person, choose_background(number, person, backgrounds, settings.seed)) for number, person in enumerate(people)]
    tasks = [Task(fingerprint((dependencies, p.number), p.person, p.background), p.person.title, p) for p in portraits]
    make_worker = lambda: ComposeWorker(load() if load and unmasked else None, folder.absolute(), settings)
    outcomes = run_resumable(tasks, make_worker, folder / JOURNAL, executor, "clips", lambda result: (folder / result["folder"] / "surroundings").is_dir())
    remove_partial_files(folder)
    pairs = [pair for outcome in outcomes if outcome.result for pair in portrait_pairs(outcome.result, folder, settings.store)]
    return outcomes, write_manifest(folder / MANIFEST, pairs)


def over(front: Tensor, back: Tensor, alpha: Tensor) -> Tensor:
    """Alpha compositing: front, back (F, H, W, 3), alpha (F, H, W) -> (F, H, W, 3), exactly `back` at alpha 0 and exactly `front` at 1."""
    return back.lerp(front, alpha[..., None]).where(alpha[..., None] < 1, front)


def portrait_pairs(result: dict, folder: Path, store: str) -> Iterator[ManifestEntry]:
    """The three pairs in a portrait's folder."""
    clips = folder / result["folder"]
    suffix = "" if store == "frames" else ".mp4"
    for edit, source, target, mask in (
        ("remove", "composite", "background", "person"),
        ("add", "background", "composite", "person"),
        ("background", "original", "composite", "surroundings"),
    ):
        yield ManifestEntry(
            clips / (source + suffix),
            None,
            result["words"][edit],
            clips / (target + suffix),
            clips / mask,
            f"{result['folder']}-{edit}",
            "portrait",
            edit,
            fps=result["fps"],
        )


def choose_instructions(item: Portrait, seed: int) -> dict[str, str]:
    """Chooses an instruction for each edit."""
    choose = random.Random(f"{seed} words {item.number}").choice
    description = item.background.instruction.strip()
    return {
        edit: choose(BACKGROUND_INSTRUCTIONS).format(description) if edit == "background" and description else choose(texts)
        for edit, texts in INSTRUCTIONS.items()
    }


def choose_background(number: int, person: ManifestEntry, backgrounds: Sequence[ManifestEntry], seed: int) -> ManifestEntry:
    """Chooses a background other than the person's own clip. Raises UserError if there is none."""
    others = [entry for entry in backgrounds if entry.source != person.source]
    if not others:
        raise UserError("there is no background to choose from", got=f"{len(backgrounds)} clips", expected="clips other than the person's own")
    return random.Random(f"{seed} background {number}").choice(others)


def read_sources(location: str, what: str) -> list[ManifestEntry]:
    """Reads a manifest whose lines need only a source, or a folder of videos. Raises UserError."""
    if is_url(location) or not check_input(location, what).is_dir():
        return read_manifest(location, required=("source",))
    files = sorted(path for path in Path(location).rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."))
    if not files:
        raise UserError("the folder holds no videos", where=f"{what} {location!r}", expected=" or ".join(VIDEO_SUFFIXES))
    return [ManifestEntry(path, None, "", name=path.stem) for path in files]
