"""The portrait recipe: a person cut out of one clip and put over another gives pairs whose outcome is known (paper, training).

From a person's clip and a background come three pairs: the person removed, the person added, the background replaced. Their masks are
exact: outside of them source and target are the same pixels.

F frames of H x W pixels.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..media.fit import cover, fit_clip, trimmed
from ..media.paths import atomic_folder, check_input, check_output_folder, numbered_name, remove_partial_files
from ..media.remote import is_url, local_copy
from ..media.video import VIDEO_SUFFIXES, read_clip, write_frames, write_video
from ..types import Clip
from .executor import Executor
from .journal import Outcome, Task, mark_of, worked_through
from .manifest import ManifestEntry, read_manifest, read_source, write_manifest
from .segment_person import Segmenter

JOURNAL, MANIFEST = "composed.jsonl", "pairs.jsonl"
STORES = ("video", "frames")  # H.264 of high quality, or PNG: 20 times the bytes
CLEAN = 0.05  # alpha nearer than this to 0 or 1 is 0 or 1: what a mask's own compression leaves
MIN_PERSON, MAX_PERSON = 0.01, 0.9  # of a clip's pixels, that a person may cover
WORDS = {
    "remove": ("remove the person", "take the person out of the video", "make the person disappear", "erase the person and keep the background as it is"),
    "add": ("add the person", "put the person of the reference into the scene", "let a person appear in front, as the reference shows"),
    "background": ("replace the background", "put the person in front of the other background", "keep the person and change everything behind"),
}
WITH_WORDS = ("replace the background with {}", "put the person in front of {}", "change everything behind the person to {}")


@dataclass(frozen=True)
class ComposeSettings:
    """What the pairs depend on beside the clips."""

    size: tuple[int, int] | None = None  # width, height; None: the person's clip's own, fitted
    num_frames: int | None = None
    seed: int = 0  # of which background and which words
    store: str = "video"


@dataclass(frozen=True)
class Portrait:
    """One person over one background."""

    number: int
    person: ManifestEntry
    background: ManifestEntry  # its instruction, where there is one, says what is seen


@dataclass(frozen=True)
class ComposeWorker:
    """Writes the clips and masks of a portrait into a folder of its own."""

    segmenter: Segmenter | None
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
        person, background, alpha = self.fitted(item, *read)
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
        return {"folder": name, "fps": person.fps, "words": words_for(item, self.settings.seed)}

    def fitted(self, item: Portrait, person: Clip, background: Clip, mask: Clip | None) -> tuple[Clip, Clip, Tensor]:
        """Both clips at one size and length, and the person's alpha (F, H, W). Raises UserError where there is next to no person, or nothing else."""
        person = fit_clip(person, self.settings.size, self.settings.num_frames, f"source {item.person.title!r}")
        size = person.frames.shape[2], person.frames.shape[1]
        count = self.settings.num_frames or min(len(person.frames), trimmed(len(background.frames)))
        person, background = Clip(person.frames[:count], person.fps), fit_clip(background, size, count, f"background {item.background.title!r}")
        alpha = self.segmenter.alpha(person.frames) if mask is None else cover(mask.frames[:count], size).mean(dim=-1).expand(count, -1, -1)
        alpha = torch.where(alpha < CLEAN, 0.0, torch.where(alpha > 1 - CLEAN, 1.0, alpha))
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
    made_by: object = "",
    executor: Executor = Executor(),
) -> tuple[list[Outcome], Path]:
    """Composes what is not there yet -> each person's outcome, and the manifest of all pairs.

    `load` gives the model that finds persons where a line names no mask. Raises UserError.
    """
    folder = check_output_folder(folder, "output")
    unmasked = [entry.title for entry in people if entry.mask is None]
    if unmasked and load is None:
        raise UserError("a person's clip has no mask", got=unmasked[0], fix="name a mask in its line, or a model that finds persons with --segmenter")
    folder.mkdir(parents=True, exist_ok=True)
    contract = (asdict(settings), made_by if unmasked else "")
    portraits = [Portrait(number, person, chosen_background(number, person, backgrounds, settings.seed)) for number, person in enumerate(people)]
    tasks = [Task(mark_of((contract, p.number), p.person, p.background), p.person.title, p) for p in portraits]
    make = lambda: ComposeWorker(load() if unmasked else None, folder.absolute(), settings)
    outcomes = worked_through(tasks, make, folder / JOURNAL, executor, "clips", lambda result: (folder / result["folder"] / "surroundings").is_dir())
    remove_partial_files(folder)
    pairs = [pair for outcome in outcomes if outcome.result for pair in pairs_of(outcome.result, folder, settings.store)]
    return outcomes, write_manifest(folder / MANIFEST, pairs)


def over(front: Tensor, back: Tensor, alpha: Tensor) -> Tensor:
    """(F, H, W, 3) twice, (F, H, W) -> (F, H, W, 3): exactly `back` where alpha is 0, exactly `front` where it is 1."""
    return back.lerp(front, alpha[..., None]).where(alpha[..., None] < 1, front)


def pairs_of(result: dict, folder: Path, store: str) -> Iterator[ManifestEntry]:
    """What a portrait's folder gives."""
    place = folder / result["folder"]
    suffix = "" if store == "frames" else ".mp4"
    for edit, source, target, mask in (
        ("remove", "composite", "background", "person"),
        ("add", "background", "composite", "person"),
        ("background", "original", "composite", "surroundings"),
    ):
        yield ManifestEntry(
            place / (source + suffix),
            None,
            result["words"][edit],
            place / (target + suffix),
            place / mask,
            f"{result['folder']}-{edit}",
            "portrait",
            edit,
            fps=result["fps"],
        )


def words_for(item: Portrait, seed: int) -> dict[str, str]:
    """The instruction of each edit."""
    choose = random.Random(f"{seed} words {item.number}").choice
    seen = item.background.instruction.strip()
    return {edit: choose(WITH_WORDS).format(seen) if edit == "background" and seen else choose(words) for edit, words in WORDS.items()}


def chosen_background(number: int, person: ManifestEntry, backgrounds: Sequence[ManifestEntry], seed: int) -> ManifestEntry:
    """Any but the person's own clip. Raises UserError where there is no other."""
    others = [entry for entry in backgrounds if entry.source != person.source]
    if not others:
        raise UserError("there is no background to choose from", got=f"{len(backgrounds)} clips", expected="clips other than the person's own")
    return random.Random(f"{seed} background {number}").choice(others)


def read_sources(place: str, what: str) -> list[ManifestEntry]:
    """A manifest whose lines need a source only, or a folder of videos. Raises UserError."""
    if is_url(place) or not check_input(place, what).is_dir():
        return read_manifest(place, required=("source",))
    files = sorted(path for path in Path(place).rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."))
    if not files:
        raise UserError("the folder holds no videos", where=f"{what} {place!r}", expected=" or ".join(VIDEO_SUFFIXES))
    return [ManifestEntry(path, None, "", name=path.stem) for path in files]
