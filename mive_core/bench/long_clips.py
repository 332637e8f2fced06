"""Compares ways to edit clips longer than the model knows: quality over time, seams, time and memory.

F frames, H x W pixels; T latent frames of L that the model knows. The ways:

- stretches: what Pipeline.run does, see stretches.py.
- windows: overlapping windows of latent frames, whose velocities are averaged at every step, as ComfyUI's context windows are.
- latents: as stretches, but without a VAE between them: the reference is the last latent frame of the one before.

The VLM reads the whole clip once for windows and latents, and each stretch by itself. Clips without cuts and keyframes are compared.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..config import TEMPORAL_FACTOR, latent_grid
from ..delivery import deliver
from ..errors import UserError
from ..evaluation.evaluate import EvaluationSettings, edited_region, vae_round_trip
from ..evaluation.metrics import mean, region_psnr
from ..flow import euler, schedule
from ..pipeline import Pipeline
from ..reference import fix_first_frame, latent_times, within_window
from ..stretches import latent_order, latent_spans, stretches
from ..types import EditLatents, EditRequest, PairedEdit
from .growth import CLEAR_REFS, context_windows, peak_growth

PARTS = ("first", "middle", "last")  # thirds of a clip
SAMPLE = 255.0  # levels of a pixel

Way = Callable[[Pipeline, EditRequest, EvaluationSettings], tuple[Tensor, Tensor, list[int]]]


def bench_long_clips(pipeline: Pipeline, pairs: Sequence[PairedEdit], settings: EvaluationSettings, ways: Sequence[str] = ()) -> dict:
    """Edits each pair in every way -> figures by clip, and their means by way and length. Memory is measured once, of the first way.

    Raises UserError for an unknown way, a pair without a target, clips that the model knows, and systems that do not report peak memory.
    """
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise UserError("unknown way", got=unknown[0], expected=" or ".join(WAYS))
    if not CLEAR_REFS.exists():
        raise UserError("this system does not tell a process's peak memory", expected="Linux")
    rows = []
    for pair in tqdm([pairs[index] for index in range(len(pairs))], desc="clips", disable=None):
        count = len(pair.request.source.frames)
        if pair.target is None or count <= pipeline.config.edit_frames:
            got = "no target" if pair.target is None else f"{count} frames"
            raise UserError("the pair is of no use here", where=pair.name, got=got, expected=f"a target, and more than {pipeline.config.edit_frames} frames")
        for name in ways or WAYS:
            rows.append(
                {
                    "name": pair.name,
                    "frames": count,
                    "size": list(pair.request.source.frames.shape[2:0:-1]),
                    "way": name,
                    **_measure(pipeline, pair, settings, WAYS[name]),
                }
            )
            if len(rows) > 1:  # the allocator still holds what the first way needed
                rows[-1]["peak_bytes"] = None
    return {"edit_frames": pipeline.config.edit_frames, "threads": torch.get_num_threads(), "means": _means(rows), "clips": rows}


def _measure(pipeline: Pipeline, pair: PairedEdit, settings: EvaluationSettings, edit: Way) -> dict:
    """Figures of one clip edited in one way; time and memory are those of the edit alone."""
    start, start_processor = time.perf_counter(), time.process_time()
    (edited, round_trip, borders), peak = peak_growth(lambda: edit(pipeline, pair.request, settings))
    figures = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - start_processor, "peak_bytes": peak, "borders": borders}
    delivered = torch.stack(list(deliver(iter(pair.request.source.frames), edited, round_trip, pair.request.reference)))
    return figures | {"raw": score(pair, edited, borders), "delivered": score(pair, delivered, borders)}


def score(pair: PairedEdit, frames: Tensor, borders: Sequence[int]) -> dict:
    """Edited frames (F, H, W, 3), and the first frame of every stretch or window but the first -> PSNR over time, and seams.

    A seam is the RMS error, in levels of 255, of the change from the frame before; `elsewhere` holds it for the other latent frames.
    """
    mask, count = edited_region(pair), len(frames)
    assert pair.target is not None
    psnr = {"whole": region_psnr(frames, pair.target, mask)}
    for index, part in enumerate(PARTS):
        span = slice(index * count // len(PARTS), (index + 1) * count // len(PARTS))
        psnr[part] = region_psnr(frames[span], pair.target[span], mask[span])
    steps = ((frames.diff(dim=0) - pair.target.diff(dim=0)).square().mean(dim=(1, 2, 3)).sqrt() * SAMPLE).tolist()
    others = [number for number in range(1 + TEMPORAL_FACTOR, count, TEMPORAL_FACTOR) if number not in borders]
    return {"psnr": psnr, "seams": {name: mean([steps[number - 1] for number in numbers]) for name, numbers in (("borders", borders), ("elsewhere", others))}}


def in_stretches(pipeline: Pipeline, request: EditRequest, settings: EvaluationSettings) -> tuple[Tensor, Tensor, list[int]]:
    result = pipeline.run(request, **settings.sampling)
    assert result.round_trip is not None
    numbers, length = latent_order(request.source.frames, pipeline.config.edit_frames), pipeline.config.edit_frames
    return result.edited.frames, result.round_trip, [numbers[first + 1] for first, _ in stretches(len(numbers), length)[1:]]


@torch.inference_mode()
def in_windows(pipeline: Pipeline, request: EditRequest, settings: EvaluationSettings) -> tuple[Tensor, Tensor, list[int]]:
    latents, tokens = _read(pipeline, request)
    source, places = latents.source, latent_times(torch.tensor([latents.reference_frames]))
    length = latent_grid(pipeline.config.edit_frames, 0, 0)[0]
    windows = context_windows(source.shape[2], length, max(length // 4, 1))
    weight = torch.minimum(torch.arange(length) + 1, length - torch.arange(length)).to(source).view(-1, 1, 1)

    def velocity(x: Tensor, t: float) -> Tensor:
        times, total, count = x.new_full((1,), t), torch.zeros_like(x), x.new_zeros(x.shape[2], 1, 1)
        for first, last in windows:
            reference, inside = within_window(latents.reference, places - first, last - first)
            total[:, :, first:last] += weight * pipeline.dit(x[:, :, first:last], source[:, :, first:last], reference, tokens, times, inside)
            count[first:last] += weight
        return fix_first_frame(total / count, x, times, source, latents.reference)

    edited = euler(velocity, _noise(source, settings), _times(pipeline, settings))
    return pipeline.vae.decode(edited), vae_round_trip(pipeline, request.source.frames), [_first_frame(first) for first, _ in windows[1:]]


@torch.inference_mode()
def in_latents(pipeline: Pipeline, request: EditRequest, settings: EvaluationSettings) -> tuple[Tensor, Tensor, list[int]]:
    latents, tokens = _read(pipeline, request)
    source, noise, edited = latents.source, _noise(latents.source, settings), torch.zeros_like(latents.source)
    length = latent_grid(pipeline.config.edit_frames, 0, 0)[0]
    spans = latent_spans(stretches(len(request.source.frames), pipeline.config.edit_frames))
    assert all(last - first <= length for first, last in spans)
    for first, last in spans:
        reference = edited[:, :, first : first + 1].clone() if first else latents.reference

        def velocity(x: Tensor, t: float, first=first, last=last, reference=reference) -> Tensor:
            times, part = x.new_full((1,), t), source[:, :, first:last]
            return fix_first_frame(pipeline.dit(x, part, reference, tokens, times), x, times, part, reference)

        edited[:, :, first + (first > 0) : last] = euler(velocity, noise[:, :, first:last], _times(pipeline, settings))[:, :, first > 0 :]
    return pipeline.vae.decode(edited), vae_round_trip(pipeline, request.source.frames), [_first_frame(first + 1) for first, _ in spans[1:]]


WAYS: dict[str, Way] = {"stretches": in_stretches, "windows": in_windows, "latents": in_latents}


def _read(pipeline: Pipeline, request: EditRequest) -> tuple[EditLatents, Tensor]:
    """The latents, and the condition tokens of the whole clip."""
    return pipeline.encode(request), pipeline.dit.embed_condition(pipeline.vlm.condition(request, pipeline.config).states)


def _noise(source: Tensor, settings: EvaluationSettings) -> Tensor:
    return torch.randn(source.shape, generator=torch.Generator().manual_seed(settings.seed)).to(source)


def _times(pipeline: Pipeline, settings: EvaluationSettings) -> Tensor:
    return schedule(settings.steps or pipeline.config.steps, settings.shift or pipeline.config.shift)


def _first_frame(latent_frame: int) -> int:
    """The first pixel frame of a latent frame."""
    return TEMPORAL_FACTOR * latent_frame - TEMPORAL_FACTOR + 1 if latent_frame else 0


def _means(rows: Sequence[dict]) -> list[dict]:
    """By way and length, over the clips."""
    means = []
    for way, frames in sorted({(row["way"], row["frames"]) for row in rows}):
        chosen = [row for row in rows if (row["way"], row["frames"]) == (way, frames)]
        figures: dict = {key: mean([row[key] for row in chosen]) for key in ("seconds", "processor_seconds", "peak_bytes")}
        for kind in ("raw", "delivered"):
            figures |= {
                kind: {
                    "psnr": {
                        part: {key: mean([row[kind]["psnr"][part][key] for row in chosen]) for key in chosen[0][kind]["psnr"][part]}
                        for part in chosen[0][kind]["psnr"]
                    },
                    "seams": {key: mean([row[kind]["seams"][key] for row in chosen]) for key in ("borders", "elsewhere")},
                }
            }
        means.append({"way": way, "frames": frames, "clips": len(chosen), **figures})
    return means
