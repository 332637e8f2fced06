"""Fits the blend of detail.py: when is the edit's own pixel nearer to the truth than the mapped source?

    python -m mive_core.embedded.detail_blend

A logistic regression on the embedded models' edits of drawn clips (training split, objects over natural pictures among them); prints
BLEND and BLEND_BIAS. About ten minutes on one CPU thread.
"""

import json
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import detail
from ..pipeline import Pipeline
from ..types import PairedEdit
from .synthetic import PairedEdits

SETS = (((96, 96), 24), ((128, 128), 24), ((160, 96), 24))  # size, number of clips
NUM_FRAMES, SEED, PER_CLIP = 9, 71, 8000
DECAY = 1e-3


def samples(pipeline: Pipeline, pair: PairedEdit, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """-> features (N, 4), whether the edit's pixel is the nearer one (N,), and how much that matters (N,)."""
    source, target, mask = pair.request.source.frames, pair.target, pair.mask
    assert target is not None and mask is not None  # drawn pairs have both
    edited = pipeline.edit(pair.request).frames
    round_trip = pipeline.vae.decode(pipeline.vae.encode(source))
    e, g, s = (x.movedim(-1, 1) for x in (edited, round_trip, source))
    matrix, offset = detail.fit_affine(e, g)
    features = torch.cat(detail.blend_features(e, detail.transform(matrix, g) + offset), dim=1)
    detailed = (detail.transform(matrix, s) + offset).clamp(0, 1)
    errors = [F.avg_pool2d((x - target.movedim(-1, 1)).square().mean(dim=1, keepdim=True), 3, 1, 1) for x in (detailed, e)]
    gain = (errors[0] - errors[1])[:, 0]
    weight = torch.zeros_like(gain)
    for region in (mask, ~mask):  # the mean of PSNRs counts relative errors, inside and outside of the edit
        if region.any():
            weight[region] = 1 / (torch.minimum(*errors)[:, 0][region].sum() + 1e-3)
    chosen = torch.randperm(gain.numel(), generator=generator)[:PER_CLIP]
    return features.movedim(1, -1).reshape(-1, 4)[chosen], (gain > 0).flatten()[chosen].float(), (gain.abs() * weight).flatten()[chosen]


def fit(features: Tensor, nearer: Tensor, weight: Tensor) -> tuple[list[float], float]:
    """Weighted logistic regression -> the weights of the four features, and the bias."""
    mean, std = features.mean(0), features.std(0)
    parameters = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = (features - mean) / std @ parameters[:4] + parameters[4]
        loss = (F.binary_cross_entropy_with_logits(logits, nearer, reduction="none") * weight / weight.mean()).mean() + DECAY * parameters.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scaled = (parameters[:4] / std).detach()
    return scaled.tolist(), (parameters[4] - (scaled * mean).sum()).item()


def main() -> None:
    torch.set_num_threads(1)
    pipeline, generator, found = Pipeline.load("tiny"), torch.Generator().manual_seed(SEED), []
    for size, num in SETS:
        edits = PairedEdits(SEED, "train", size, NUM_FRAMES)
        found += [samples(pipeline, edits.sample(index).pair, generator) for index in range(num)]
    weights, bias = fit(*(torch.cat(columns) for columns in zip(*found)))
    sys.stdout.write(json.dumps({"BLEND": [round(w, 2) for w in weights], "BLEND_BIAS": round(bias, 2)}) + "\n")


if __name__ == "__main__":
    main()
