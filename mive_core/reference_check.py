"""Whether a reference is the frame of the clip that it stands for, edited, in the same framing. (ours)

Edges are compared at a low resolution, since they survive changes of colour; an edit may replace most of them, so the best part of the picture
counts, and an unrelated picture must differ in its colours, too. A wrong reference is no error: an edit may leave nothing of the source.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .anchor import shows_edit
from .media.fit import resize
from .registration import IDENTITY, INNER, correlation, edges, places, search
from .types import Keyframe

SIDE = 160  # longer side of the edges, in pixels
PARTS, MIN_VARIANCE = 5, 0.1  # overlapping parts along each axis; of a part's edges, from which it is compared
CELLS = (9, 16)  # rows and columns at which colours are compared
ALIGNED = 0.8  # correlation of edges from which the framing is the same; in a part alone it may be chance, or the centre of a zoom
UNRELATED, UNRELATED_PART = 0.1, 0.35  # of the whole and of its best part; unrelated photographs have reached 0.08 and 0.32
SAME_COLOUR, SAME_BRIGHTNESS = 0.05, 0.8  # mean difference of cells; correlation of their brightness, which a blurred or posterised edit keeps
MIN_GAIN, MIN_CORRELATION = 0.1, 0.2  # of a moved reference, or another frame of the clip, against the reference as it is
MOVED, SLIGHT = 0.01, 0.025  # of a side, or of the size
MANIFEST = 0.5  # correlation that is asked of a slight move, since a drawing's lines lie beside the edges, and where a part fits as it is
WIDE_ZOOMS, WIDE_SHIFT = [1.06**step for step in range(-10, 11)], 0.5  # searched where nothing fits
NUM_FRAMES = 8  # of the clip that an ill-fitting reference is compared with


def warn_of_references(frames: Tensor, reference: Tensor, keyframes: Sequence[Keyframe] = ()) -> None:
    """Warns of a reference (H, W, 3), and of keyframes, that are no edited frames of the clip (F, H, W, 3): see describe_reference."""
    for what, number, image in (("reference", 0, reference), *((f"keyframe {keyframe.number}", keyframe.number, keyframe.image) for keyframe in keyframes)):
        found = describe_reference(image, frames, number, only=not keyframes)
        if found is not None:
            warnings.warn(f"{what}: {found}", stacklevel=2)


def describe_reference(reference: Tensor, frames: Tensor, number: int = 0, only: bool = True) -> str | None:
    """An edited frame (H, W, 3) and the clip (F, H, W, 3) -> what is wrong with it and what to do; None if it fits frame `number`.

    only: no other edited frame is given, so that one without an edit is told of.
    """
    frame, name = frames[number], "the source's first frame" if number == 0 else f"the source's frame {number}"
    frame = _small(frame)
    reference = resize(reference.float().cpu(), (frame.shape[1], frame.shape[0]))
    if only and not shows_edit(reference, frame):
        return f"it is {name} without an edit, so the instruction alone says what to change; give the edited frame if there is one"
    moving, fixed = edges(reference, SIDE), edges(frame, SIDE)
    if min(moving.abs().max(), fixed.abs().max()) < 1e-3:  # flat
        return None
    overall = _correlation(fixed, moving)
    if overall > ALIGNED:
        return None
    other = _best_frame(moving, frames, number)
    if other[1] > max(overall + MIN_GAIN, MIN_CORRELATION):
        return f"it looks like frame {other[0]} of the source, not like {name}; edit frame {number}, or cut the source to begin there"
    part, transform = _best_part(fixed, moving), search(fixed, moving)
    needed = MIN_CORRELATION if part < ALIGNED and _has_moved(transform, SLIGHT) else MANIFEST
    if _has_moved(transform, MOVED) and _correlation(fixed, moving, transform) > max(overall + MIN_GAIN, needed):
        return f"its framing differs from that of {name}: {_describe(transform)}; register it (MiVE Register Reference, or --register)"
    if overall > UNRELATED or part > UNRELATED_PART or _has_similar_colours(reference, frame):
        return None
    transform = search(fixed, moving, WIDE_ZOOMS, WIDE_SHIFT)
    if _correlation(fixed, moving, transform) > MIN_CORRELATION:
        return f"it shows another section than {name}: {_describe(transform)}; edit the whole frame, in the source's shape"
    return f"it has nothing in common with {name}; it should be that frame, edited, in the same framing"


def edge_correlation(frame: Tensor, image: Tensor) -> float:
    """Two images of one size, (H, W, 3) -> the correlation of their edges."""
    return _correlation(edges(frame, SIDE), edges(image, SIDE))


def _small(image: Tensor) -> Tensor:
    """(H, W, 3) -> on the CPU, with the longer side at most 2 * SIDE."""
    scale = min(1.0, 2 * SIDE / max(image.shape[:2]))
    return resize(image.float().cpu(), (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))))


def _correlation(fixed: Tensor, moving: Tensor, transform: Tensor = IDENTITY) -> float:
    points = places(*fixed.shape[2:]).view(-1, 2)
    return correlation(fixed, moving, points[(points.abs() < INNER).all(dim=1)], transform)


def _best_part(fixed: Tensor, moving: Tensor) -> float:
    """The largest correlation of edges (1, 1, h, w) in a part of the picture, among those with edges of their own in both."""
    size = [max(8, 2 * side // (PARTS + 1)) for side in fixed.shape[2:]]
    parts = F.avg_pool2d(torch.cat([fixed, moving, fixed.square(), moving.square(), fixed * moving], dim=1), size, [side // 2 for side in size])
    a, b, aa, bb, ab = parts[0]
    variances = torch.stack([aa - a.square(), bb - b.square()])
    compared = (variances > MIN_VARIANCE).all(dim=0)
    return float(((ab - a * b) / variances.prod(dim=0).sqrt())[compared].max()) if compared.any() else 0.0


def _best_frame(moving: Tensor, frames: Tensor, number: int) -> tuple[int, float]:
    """The number of the frame whose edges fit best, of NUM_FRAMES from the whole clip, and its correlation."""
    numbers = {round(i * (len(frames) - 1) / (NUM_FRAMES - 1)) for i in range(NUM_FRAMES)} - {number}
    return max(((other, _correlation(edges(_small(frames[other]), SIDE), moving)) for other in sorted(numbers)), key=lambda found: found[1], default=(0, -1.0))


def _has_similar_colours(reference: Tensor, frame: Tensor) -> bool:
    cells = [F.adaptive_avg_pool2d(image.movedim(-1, 0), CELLS) for image in (reference, frame)]
    brightness = torch.stack([x.mean(dim=0).flatten() for x in cells])
    difference = (cells[0] - cells[1]).abs().amax(dim=0).mean()
    return bool(difference < SAME_COLOUR or torch.corrcoef(brightness)[0, 1].abs() > SAME_BRIGHTNESS)


def _has_moved(transform: Tensor, least: float) -> bool:
    return bool(max(abs(transform[0] - 1), transform[1:].abs().max() / 2) > least)


def _describe(transform: Tensor) -> str:
    """Transform (zoom, x, y) -> words; places run from -1 to 1, so a shift of 1 is half a side."""
    zoom, x, y = transform.tolist()
    parts = [f"{'enlarged' if zoom > 1 else 'reduced'} by {abs(zoom - 1):.0%}"] if abs(zoom - 1) > MOVED / 2 else []
    for shift, words in ((x, ("left", "right")), (y, ("up", "down"))):
        if abs(shift) / 2 > MOVED / 2:
            parts.append(f"moved {words[shift > 0]} by {abs(shift) / 2:.0%}")
    return ", ".join(parts)
