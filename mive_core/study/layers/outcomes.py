"""What the layer study measures of an edited clip: where it was changed, to what, and PSNR.

WHERE asks nothing of colours and shapes: the region that the edit changed is compared with the one that it should change. WHAT asks nothing
of places: a classifier that averages over the frame is asked which edit it sees.
F frames of H x W pixels, C channels; N clips.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_dilation, binary_erosion
from torch import Tensor, nn
from tqdm import tqdm

from ...embedded.synthetic import COLOURS, EDITS, SHAPES, EditLabels, SyntheticEdit
from ...embedded.vae_network import WholeClipVAE, decode_clips
from ...evaluation.metrics import region_psnr

BAND = 2  # pixels on either side of the true mask's edge
CHANGED = 0.5  # of the true edit's median change, from which a pixel counts as changed
FIELDS = {"edit": EDITS, "colour": COLOURS, "shape": SHAPES}
WHERE = ("mask_iou", "centroid_error", "edge_error")
WHAT = tuple(f"{field}_right" for field in FIELDS)
FRAMES = (0, 4, 8, 12, 16)  # that the classifier sees


@dataclass(frozen=True)
class Truth:
    """A held-out clip: what an edit should change it to."""

    kind: str
    labels: EditLabels
    target: Tensor  # (F, H, W, 3)
    mask: Tensor  # (F, H, W) bool: what the edit changes
    source: Tensor  # (F, H, W, 3) after the VAE
    ceiling: Tensor  # (F, H, W, 3) the target after the VAE


def truths_of(edits: Sequence[SyntheticEdit], source: Tensor, target: Tensor, vae: WholeClipVAE) -> list[Truth]:
    """Gathers the truth of some clips, whose latents are source and target (N, C, T, Y, X)."""
    found = []
    for edit, before, after in zip(edits, decoded(vae, source), decoded(vae, target)):
        assert edit.pair.target is not None and edit.pair.mask is not None
        found.append(Truth(edit.kind, edit.labels, edit.pair.target, edit.pair.mask, before, after))
    return found


@torch.inference_mode()
def decoded(vae: WholeClipVAE, latents: Tensor) -> list[Tensor]:
    """Latents (N, C, T, Y, X) -> N clips (F, H, W, 3) in 0..1. One at a time: eight at once take twice as long on a CPU."""
    return [clip.clamp(0, 1) for latent in latents.float().split(1) for clip in decode_clips(vae, latent)]


def expected(labels: EditLabels) -> dict[str, int]:
    """What the classifier should find: the kind of edit, and colour and shape of what is there afterwards (0: nothing)."""
    return {"edit": EDITS.index(labels.edit), "colour": COLOURS.index(labels.new_colour), "shape": SHAPES.index(labels.new_shape)}


def where(edited: Tensor, truth: Truth) -> dict[str, float]:
    """Mask IoU, the centroids' distance in pixels, and the mean absolute error in the band around the mask's edge.

    The changed region is where the edited clip differs from the source after the VAE by more than CHANGED of the true edit's median change.
    A frame without a changed pixel counts with the distance from the true centroid to the frame's farthest corner.
    """
    change, true_change = ((clip - truth.source).norm(dim=-1) for clip in (edited, truth.ceiling))
    visible = truth.mask & (true_change > 0.05)
    level = CHANGED * float(true_change[visible].median()) if visible.any() else CHANGED
    changed, true = change > level, truth.mask
    iou = float((changed & true).sum() / (changed | true).sum().clamp(min=1))
    distances = [centroid_distance(one, other) for one, other in zip(changed.numpy(), true.numpy()) if other.any()]
    band = edge_band(true.numpy())
    error = float((edited - truth.ceiling).abs().mean(dim=-1)[band].mean())
    return {"mask_iou": iou, "centroid_error": float(np.mean(distances)), "edge_error": error}


def centroid_distance(found: np.ndarray, true: np.ndarray) -> float:
    """Masks (H, W) bool -> pixels."""
    y, x = (axis.mean() for axis in np.nonzero(true))
    if not found.any():
        height, width = true.shape
        return float(np.hypot(max(x, width - x), max(y, height - y)))
    found_y, found_x = (axis.mean() for axis in np.nonzero(found))
    return float(np.hypot(found_x - x, found_y - y))


def edge_band(mask: np.ndarray) -> Tensor:
    """(F, H, W) bool -> (F, H, W) bool: pixels at most BAND from the mask's edge."""
    frames = [binary_dilation(one, iterations=BAND) & ~binary_erosion(one, iterations=BAND, border_value=1) for one in mask]
    return torch.from_numpy(np.stack(frames))


class Classifier(nn.Module):
    """Sees source and edited clip and tells the kind of edit, the colour and the shape. It averages over frames and places, so it is blind to these."""

    def __init__(self, width: int = 48):
        super().__init__()
        sizes = (9, width, 2 * width, 2 * width, 3 * width)
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(before, after, 3, stride=1 + (number < 2), padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.score = nn.Conv2d(sizes[-1], 1, 1)  # where to look
        self.heads = nn.ModuleDict({field: nn.Linear(sizes[-1], len(words)) for field, words in FIELDS.items()})

    def forward(self, source: Tensor, edited: Tensor) -> dict[str, Tensor]:
        """(N, F, H, W, 3) each -> logits of each field."""
        pixels = torch.cat([source, edited, edited - source], dim=-1).movedim(-1, 2)
        features = self.body(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])  # (N, F, C, h, w)
        weight = self.score(features.flatten(0, 1)).unflatten(0, pixels.shape[:2]).transpose(1, 2).flatten(2).softmax(-1)
        pooled = (features.transpose(1, 2).flatten(2) * weight).sum(-1)
        return {field: head(pooled) for field, head in self.heads.items()}


def train_classifier(source: Tensor, target: Tensor, labels: Tensor, num_decoded: int, num_steps: int, batch_size: int = 32, seed: int = 0) -> Classifier:
    """Trains on true edits: source and target (N, len(FRAMES), H, W, 3) in uint8, labels (N, len(FIELDS)) int64.

    The first num_decoded are after the VAE and make half of every batch; the others are as drawn, and blurred half of the time. One in eight
    examples is unedited: its kind is none. Places are shifted and mirrored, so that they tell nothing.
    """
    torch.manual_seed(seed)
    model, generator = Classifier(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps)
    odds = torch.ones(len(source))
    odds[:num_decoded] = max(1.0, len(source) / num_decoded - 1)
    for _ in tqdm(range(num_steps), desc="classifier", unit="step", mininterval=5.0):
        chosen = torch.multinomial(odds, batch_size, replacement=True, generator=generator)
        before, after, wanted = source[chosen].float() / 255, target[chosen].float() / 255, labels[chosen].clone()
        after[: batch_size // 8], wanted[: batch_size // 8] = before[: batch_size // 8], 0
        drawn = chosen >= num_decoded
        if torch.rand((), generator=generator) < 0.5:
            before[drawn], after[drawn] = blurred(before[drawn]), blurred(after[drawn])
        shift = torch.randint(-16, 17, (2,), generator=generator).tolist()
        before, after = (clip.roll(shift, (2, 3)) for clip in (before, after))
        if torch.rand((), generator=generator) < 0.5:
            before, after = before.flip(3), after.flip(3)
        after = (after + 0.02 * torch.randn(after.shape, generator=generator)).clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(before, after)
        loss = torch.stack([F.cross_entropy(logits[field].float(), wanted[:, i]) for i, field in enumerate(FIELDS)]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def blurred(clips: Tensor) -> Tensor:
    """(N, F, H, W, 3) -> the same, each pixel the mean of 3 x 3."""
    images = clips.movedim(-1, 2)
    return F.avg_pool2d(images.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).unflatten(0, images.shape[:2]).movedim(2, -1)


@torch.inference_mode()
def what(classifier: Classifier, edited: Tensor, truth: Truth) -> dict[str, float]:
    """1 or 0 for each field: whether the classifier finds what was asked for."""
    frames = list(FRAMES)
    logits = classifier(truth.source[frames][None], edited[frames][None])
    return {f"{field}_right": float(logits[field][0].argmax() == index) for field, index in expected(truth.labels).items()}


def measure(edited: Sequence[Tensor], truths: Sequence[Truth], classifier: Classifier) -> list[dict[str, float | str | None]]:
    """Returns the outcomes of each clip."""
    rows: list[dict[str, float | str | None]] = []
    for clip, truth in zip(edited, truths):
        quality = region_psnr(clip, truth.target, truth.mask)
        rows.append(
            {"kind": truth.kind, **where(clip, truth), **what(classifier, clip, truth), **{name: quality[name] for name in ("psnr_edited", "psnr_kept")}}
        )
    return rows
