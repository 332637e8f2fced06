"""Edit small, deliver large: what editing at a fraction of the delivered side costs in quality and spares in time.

Measured with real edits of pairs whose target is known, and counted for the paper's model from shapes alone.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..config import PRESETS, SIZE_MULTIPLE
from ..cost.flops import dit_flops
from ..data.manifest import ManifestPairs
from ..delivery import deliver
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings, pair_psnr, timed_edit, vae_round_trip
from ..evaluation.full_size import FullSizePairs
from ..evaluation.metrics import FIGURES, mean
from ..media.fit import edit_size, resize
from ..pipeline import Pipeline
from ..train.budget import clip_layout

FRACTIONS = (1, 2, 3, 4)  # the delivered side over the edit's
PAPER, PAPER_SIZE, PAPER_FRAMES = "14b", (1280, 720), 81


@torch.inference_mode()
def measure_sizes(pairs: ManifestPairs, num: int, save: Callable[[dict[str, Any]], None], models: str = "tiny", fractions: Sequence[int] = FRACTIONS) -> None:
    """Edits the first `num` pairs at each fraction of their own side and delivers them at that side; saves the report after each fraction.

    Of each fraction: PSNR of the enlarged edit, of the delivered one and of the VAE's round trip of the target (enlarged: the ceiling of the
    former), means over the clips; seconds of a clip's edit and of its delivery. Raises UserError for a pair without a target.
    """
    pipeline, settings = Pipeline.load(models), EvaluationSettings()
    rows: dict[str, Any] = {}
    for fraction in fractions:
        clips: list[dict[str, Any]] = []
        for index in range(min(num, len(pairs))):
            pair = pairs[index]
            if pair.target is None:
                raise UserError("the pair has no target", where=pair.name, fix="leave it out of the manifest")
            width, height = pair.request.source.frames.shape[2], pair.request.source.frames.shape[1]
            size = size_at((width, height), fraction)
            fitted = FullSizePairs(pairs, size).fit(pair.request, pipeline.config.edit_pixels)
            edited, seconds = timed_edit(pipeline, fitted, settings)
            start = time.perf_counter()
            round_trip = vae_round_trip(pipeline, fitted.source.frames)
            delivered = torch.stack(list(deliver(pair.request.source.frames, edited.frames, round_trip, pair.request.reference)))
            delivery_seconds = time.perf_counter() - start
            target = vae_round_trip(pipeline, resized(pair.target, size))
            shown = {"enlarged": resized(edited.frames, (width, height)), "delivered": delivered, "ceiling": resized(target, (width, height))}
            figures = {name: pair_psnr(frames, pair) for name, frames in shown.items()}
            clips.append({"name": pair.name, "size": size, "seconds": seconds, "delivery_seconds": delivery_seconds, **figures})
        means: dict[str, Any] = {name: {key: mean([clip[name][key] for clip in clips]) for key in FIGURES} for name in ("enlarged", "delivered", "ceiling")}
        rows[str(fraction)] = {**means, **{key: mean([clip[key] for clip in clips]) for key in ("seconds", "delivery_seconds")}, "clips": clips}
        save({"models": models, "clips": len(clips), "measured": rows, "counted": counted(fractions)})


def resized(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(F, H, W, 3) -> (F, height, width, 3) for size (width, height)."""
    return torch.stack([resize(frame, size) for frame in frames])


def size_at(size: tuple[int, int], fraction: int) -> tuple[int, int]:
    """(width, height) to deliver -> the size to edit at, in multiples of 16; the size itself where it is one."""
    if fraction == 1 and not any(side % SIZE_MULTIPLE for side in size):
        return size
    return edit_size(size, size[0] * size[1] // fraction**2)


def counted(fractions: Sequence[int]) -> dict[str, Any]:
    """FLOPs of one forward of PAPER at PAPER_SIZE, and at fractions of its side and at 832x480 the share of it, in all and of the attention."""
    config = PRESETS[PAPER]
    sizes = {str(fraction): size_at(PAPER_SIZE, fraction) for fraction in fractions} | {"832x480": (832, 480)}
    layouts = {name: (size, clip_layout(size, PAPER_FRAMES, config)) for name, size in sizes.items()}
    whole = clip_layout(PAPER_SIZE, PAPER_FRAMES, config)
    return {
        name: {
            "size": size,
            "tokens": layout.num_tokens,
            "flops": dit_flops(config, layout),
            "share": dit_flops(config, layout) / dit_flops(config, whole),
            "share_of_attention": (layout.num_tokens / whole.num_tokens) ** 2,
        }
        for name, (size, layout) in layouts.items()
    }
