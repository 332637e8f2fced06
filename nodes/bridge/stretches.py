"""Sampling a clip longer than the checkpoint knows: in stretches that share one latent frame, without a VAE between them.

Each stretch is sampled as a clip of its own, whose reference is the last latent frame of the one before. B batch, C latent channels,
T x Y x X latent grid.
"""

from collections.abc import Callable

import torch

from ...mive_core.config import TEMPORAL_FACTOR
from ...mive_core.stretches import latent_spans, stretches
from .conditioning import GUIDES, REFERENCE_FRAMES

HANDLER = "context_handler"  # where the core's context window nodes put theirs among a MODEL's options

Sample = Callable[[list, list, dict], dict]  # positive, negative and LATENT -> LATENT


def latent_stretches(model, num_frames: int, edit_frames: int) -> list[tuple[int, int]]:
    """A MODEL, T and the frames that its checkpoint knows -> spans of latent frames; one of all if the MODEL has context windows."""
    if HANDLER in model.model_options:
        return [(0, num_frames)]
    return latent_spans(stretches(TEMPORAL_FACTOR * (num_frames - 1) + 1, edit_frames))


def sample_stretches(sample: Sample, positive: list, negative: list, latent: dict, spans: list[tuple[int, int]]) -> dict:
    """Samples the spans of a LATENT, (B, C, T, Y, X), one after the other, and joins them."""
    if len(spans) == 1:
        return sample(positive, negative, latent)
    made: dict = {}
    pieces: list[torch.Tensor] = []
    for first, last in spans:
        cut = [[[states, _cut_guides(values, first, last, pieces)] for states, values in conditioning] for conditioning in (positive, negative)]
        made = sample(cut[0], cut[1], _cut_latent(latent, first, last))
        pieces.append(made["samples"][:, :, 1:] if first else made["samples"])
    kept = {key: latent[key] for key in ("noise_mask",) if key in latent}
    return {**made, **kept, "samples": torch.cat(pieces, dim=2)}


def _cut_guides(values: dict, first: int, last: int, pieces: list[torch.Tensor]) -> dict:
    """The dict of a CONDITIONING for latent frames first to last - 1: a keyframe counts in the stretch after whose first latent frame it lies."""
    source, references = (values[key] for key in GUIDES.values())
    numbers = [number - TEMPORAL_FACTOR * first for number in values.get(REFERENCE_FRAMES, (0,))]
    inside = [index for index, number in enumerate(numbers) if index and 0 < number <= TEMPORAL_FACTOR * (last - first - 1)]
    reference = pieces[-1][:, :, -1:].to(references) if first else references[:, :, :1]
    keyframes = references[:, :, inside].expand(len(reference), *[-1] * 4)
    return {
        **values,
        GUIDES["source"]: source[:, :, first:last],
        GUIDES["reference"]: torch.cat([reference, keyframes], dim=2),
        REFERENCE_FRAMES: (0, *(numbers[index] for index in inside)),
    }


def _cut_latent(latent: dict, first: int, last: int) -> dict:
    """The LATENT's frames; a mask of one frame, or without frames, belongs to all."""
    samples, mask = latent["samples"], latent.get("noise_mask")
    cut = {**latent, "samples": samples[:, :, first:last]}
    if mask is not None and mask.ndim == 5 and mask.shape[2] == samples.shape[2]:
        cut["noise_mask"] = mask[:, :, first:last]
    return cut
