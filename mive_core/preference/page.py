"""One HTML file that shows pairs of edits of the same clip and collects votes, and the key that says which system made which video.

The page works from file:// and asks no server for anything. It holds random tokens in place of the systems' names; all videos are encoded
anew in one way, at the source's size where they have its shape, without sound and metadata, in random order.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from random import SystemRandom
from tempfile import TemporaryDirectory

from PIL import Image
from torch import Tensor

from ..data.manifest import ManifestEntry
from ..errors import UserError
from ..media.encode import Encoding, quantise
from ..media.fit import SAME_SHAPE, resize, stretch_of
from ..media.images import read_image
from ..media.paths import atomic_write, check_output
from ..media.remote import local_copy
from ..media.video import read_fps, stream_clip, write_stream
from .systems import System
from .votes import KEY_FORMAT, VOTES_FORMAT, checksum

TEMPLATE = Path(__file__).parents[1] / "assets" / "preference" / "page.html"
KEY_SUFFIX = ".key.json"
MEGABYTE = 10**6
CERTAINLY = 2  # times the largest size: an estimate by the first clips, from which the others are not encoded


@dataclass(frozen=True)
class PageOptions:
    """How a page is made."""

    ask_scores: bool = False  # a score of 1 to 5 for each video, beside the choice
    height: int = 480  # pixels; taller videos are scaled down
    crf: int = 16  # of the videos' H.264
    max_bytes: int = 300 * MEGABYTE  # of the page


@dataclass
class Media:
    """The page's videos and images by token, in base64."""

    random: SystemRandom
    items: dict[str, tuple[str, str]] = field(default_factory=dict)  # token -> (media type, base64)

    def add(self, media_type: str, content: bytes) -> str:
        """Returns the token."""
        token = new_token(self.random)
        self.items[token] = (media_type, base64.b64encode(content).decode())
        return token

    def check_size(self, max_bytes: int, num_clips: int, num_done: int) -> None:
        """Raises UserError if the page is too large, or will be by far."""
        num_bytes = sum(len(content) for _, content in self.items.values())
        estimate = num_bytes * num_clips / num_done
        if num_bytes > max_bytes or estimate > CERTAINLY * max_bytes:
            raise UserError(
                "the page would be too large for a browser",
                got=f"about {estimate / MEGABYTE:.3g} MB by {num_done} of {num_clips} clips",
                expected=f"{max_bytes / MEGABYTE:g} MB at most",
                fix="make the videos smaller (--height, --crf), split the manifest into several pages, or raise --max-size",
            )


def make_page(
    entries: Sequence[ManifestEntry],
    systems: Sequence[System],
    path: str | Path,
    options: PageOptions = PageOptions(),
    report: Callable[[str], None] = lambda line: None,
    command: str = "",
) -> tuple[Path, Path]:
    """Writes the page and, beside it, its key -> their paths. `report` is told the size before anything is written.

    Each pair of systems is compared on each clip. Raises UserError for files that cannot be read, a page that would be too large, and one
    that exists: its votes need the key that would be overwritten.
    """
    path = check_output(path, "output", (".html",))
    key_path = path.with_name(path.stem + KEY_SUFFIX)
    for existing in (path, key_path):
        if existing.exists():
            raise UserError("votes on an earlier page need its key", where=f"output {str(existing)!r}", got="a file that exists", fix="choose another name")
    random = SystemRandom()
    media = Media(random)
    clips, comparisons, videos, key_comparisons = {}, [], {}, {}
    with TemporaryDirectory() as folder:
        for index, entry in enumerate(entries):
            clip, where = new_token(random), Path(folder) / "video.mp4"
            source = local_copy(entry.source, "source")
            fps = read_fps(source, entry.fps)
            content, size = encode_video(source, "source", fps, where, options)
            shown = {"source": media.add("video/mp4", content), "reference": media.add("image/png", encode_reference(entry, options.height))}
            clips[clip] = {"instruction": entry.instruction, **shown}
            own = {}
            for system in systems:
                video = system.videos[index]
                content, _ = encode_video(video, f"{system.name}'s edit", read_fps(video, fps), where, options, like=size)
                token = media.add("video/mp4", content)
                own[system.name], videos[token] = token, {"system": system.name, "clip": clip}
            for pair in combinations(own.values(), 2):
                first, second = random.sample(pair, 2)
                comparison = new_token(random)
                comparisons.append({"id": comparison, "clip": clip, "first": first, "second": second})
                key_comparisons[comparison] = {"clip": clip, "first": first, "second": second}
            media.check_size(options.max_bytes, len(entries), index + 1)
    random.shuffle(comparisons)
    page = {"page": new_token(random), "scores": options.ask_scores, "votes_format": VOTES_FORMAT, "clips": clips, "comparisons": comparisons}
    text = fill_template(page, media, random)
    key = {
        "format": KEY_FORMAT,
        "page": page["page"],
        "command": command,
        "scores": options.ask_scores,
        "systems": [system.name for system in systems],
        "clips": {clip: {"name": entry.title, "instruction": entry.instruction} for clip, entry in zip(clips, entries)},
        "videos": videos,
        "comparisons": key_comparisons,
    }
    report(f"{len(entries)} clips, {len(systems)} systems, {len(comparisons)} pairs to compare: a page of {len(text) / MEGABYTE:.3g} MB")
    with atomic_write(key_path) as partial_key, atomic_write(path) as partial:  # both whole, or neither
        partial_key.write_text(json.dumps(key | {"checksum": checksum(key)}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.write_text(text, encoding="utf-8")
    return path, key_path


def fill_template(page: dict, media: Media, random: SystemRandom) -> str:
    """The page's text, its media in random order."""
    items = list(media.items.items())
    random.shuffle(items)
    text = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")  # an instruction may hold </script>
    scripts = [f'<script type="application/json" id="page">{text}</script>']
    scripts += [f'<script type="text/plain" id="m-{token}" data-type="{kind}">{content}</script>' for token, (kind, content) in items]
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- DATA -->")
    return before + "\n".join(scripts) + after


def encode_video(source: Path, what: str, fps: float, path: Path, options: PageOptions, like: tuple[int, int] | None = None) -> tuple[bytes, tuple[int, int]]:
    """A video as read_clip takes it -> an MP4 that browsers play, H.264 in 4:2:0 of even sides without sound, and its (width, height).

    It is scaled to the size `like` if that has its shape. `path` is used meanwhile. Raises UserError.
    """
    frames = stream_clip(source, what=what)
    first = next(frames)
    size = shown_size((first.shape[1], first.shape[0]), options.height)
    if like is not None and stretch_of((1, *first.shape), like) <= SAME_SHAPE:
        size = like
    write_stream(path, (resize(frame, size) for frame in chain([first], frames)), size, fps, encoding=Encoding("h264", options.crf))
    content = path.read_bytes()
    path.unlink()
    return content, size


def encode_reference(entry: ManifestEntry, height: int) -> bytes:
    """The entry's reference, else its target's first frame -> PNG."""
    if entry.reference is not None:
        image = read_image(local_copy(entry.reference, "reference"), what="reference")
    else:
        assert entry.target is not None  # a manifest's row has one of them
        image = next(stream_clip(local_copy(entry.target, "target"), what="target", num_frames=1))
    return png(resize(image, shown_size((image.shape[1], image.shape[0]), height)))


def png(image: Tensor) -> bytes:
    """(H, W, 3) in 0..1 -> the file."""
    buffer = io.BytesIO()
    Image.fromarray(quantise(image, is_deep=False)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def shown_size(size: tuple[int, int], height: int) -> tuple[int, int]:
    """(width, height) -> even sides, of at most that height and in the same shape."""
    scale = min(1.0, height / size[1])
    width, height = (max(2, 2 * round(side * scale / 2)) for side in size)
    return width, height


def new_token(random: SystemRandom) -> str:
    return f"{random.getrandbits(48):012x}"
