"""Figures of an edit that need no model and, but for SSIM, no known result.

F frames, H x W pixels in 0..1. Figures of single frames are means over at most MAX_FRAMES of them, evenly spaced, and `warping_error` over
at most MAX_FLOWS pairs of neighbours, so that a clip takes seconds. SSIM is that of Wang et al. (2004) in RGB, CIEDE2000 and the optical flow
are scikit-image's.
"""

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from ..types import PairedEdit
from .metrics import mean, psnr, shows_edit
from .optical_flow import optical_flow, small_gray, warp

QUALITY = (
    "ssim",  # of the edit and the target, over whole frames
    "ssim_edited",  # inside the mask
    "kept_ssim",  # outside the mask, of the edit and the source
    "kept_psnr",
    "kept_ciede2000",
    "reference_ssim",  # of the first frame and a reference that shows an edit
    "reference_psnr",
    "reference_ciede2000",
    "flicker",
    "warping_error",
    "warping_error_source",  # the source's own, which the flow leaves
)
MAX_FRAMES, MAX_FLOWS = 16, 8
MAX_COLOURS = 200_000  # pixels of a clip whose colours are compared
STILL = 2 / 255  # by which a pixel that stands still may change, such as by compression
MIN_STILL = 0.01  # share of all pixels that must stand still
VISIBILITY = 50.0  # alpha of the visibility mask exp(-alpha |error|^2)


def quality(pair: PairedEdit, edited: Tensor) -> dict[str, float | None]:
    """QUALITY of an edited clip, (F, H, W, 3); None for what the pair lacks the means to measure, and throughout if a pixel is not finite."""
    source, reference, target, mask = pair.request.source.frames, pair.request.reference, pair.target, pair.mask
    figures: dict[str, float | None] = dict.fromkeys(QUALITY)
    if not edited.isfinite().all():
        return figures
    chosen = evenly_spaced(len(source), MAX_FRAMES)
    frames, everywhere = edited[chosen], torch.ones_like(reference[..., 0], dtype=torch.bool)
    if target is not None:
        similarity = ssim_map(frames, target[chosen])
        figures |= {"ssim": similarity.mean().item(), "ssim_edited": _mean_inside(similarity, mask[chosen]) if mask is not None else None}
    if mask is not None and not mask[chosen].all():
        kept = ~mask[chosen]
        figures |= {
            "kept_ssim": _mean_inside(ssim_map(frames, source[chosen]), kept),
            "kept_psnr": psnr(edited, source, ~mask),
            "kept_ciede2000": ciede2000(frames, source[chosen], kept),
        }
    if shows_edit(reference, source):
        figures |= {
            "reference_ssim": ssim_map(edited[:1], reference[None]).mean().item(),
            "reference_psnr": psnr(edited[0], reference, everywhere),
            "reference_ciede2000": ciede2000(edited[0], reference, everywhere),
        }
    return figures | {"flicker": flicker(edited, source)} | warping_errors(edited, source)


def ssim_map(frames: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pixel, (F, H, W, 3) twice -> (F, H, W); Wang's Gaussian window of 11x11 pixels."""
    options = dict(channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
    maps = [structural_similarity(frame.numpy(), other.numpy(), **options)[1].mean(axis=-1) for frame, other in zip(frames, others)]
    return torch.from_numpy(np.stack(maps))


def ciede2000(frames: Tensor, others: Tensor, region: Tensor) -> float | None:
    """Mean CIEDE2000 colour difference in the region, (..., 3) twice, (...) bool -> 0 for equal, about 2 is just visible; None if it is empty."""
    if not region.any():
        return None
    colours = [image[region] for image in (frames, others)]
    step = -(-len(colours[0]) // MAX_COLOURS)
    first, second = (rgb2lab(colour[::step].clamp(0, 1).double().numpy()) for colour in colours)
    return float(deltaE_ciede2000(first, second).mean())


def flicker(edited: Tensor, source: Tensor) -> float | None:
    """Mean absolute change from frame to frame, in levels of 255, of pixels that stand still in the source; (F, H, W, 3) twice.

    VBench's temporal flickering (Huang et al., 2024), which measures scenes without motion, for the parts of any scene that have none.
    None if less than MIN_STILL of all pixels stand still.
    """
    still = source.diff(dim=0).abs().amax(dim=-1) <= STILL
    if not still.numel() or still.float().mean() < MIN_STILL:
        return None
    return edited.diff(dim=0).abs().mean(dim=-1)[still].mean().item() * 255


def warping_errors(edited: Tensor, source: Tensor) -> dict[str, float | None]:
    """Mean squared difference of each frame and the next one, moved back along the source's optical flow; (F, H, W, 3) twice.

    Lai et al. (2018), with the soft visibility mask of their loss in place of an occlusion test: a pixel counts for
    exp(-VISIBILITY |error|^2) of the source's own error. None for a single frame.
    """
    errors: dict[str, list[float]] = {"warping_error": [], "warping_error_source": []}
    for first in evenly_spaced(len(source) - 1, MAX_FLOWS):
        to, origin = small_gray(source[first : first + 2])
        flow = optical_flow(to, origin)
        changes = [(frames[first] - warp(frames[first + 1].movedim(-1, 0)[None], flow)).square() for frames in (edited, source)]
        weight = torch.exp(-VISIBILITY * changes[1].sum(dim=-1, keepdim=True))
        for name, change in zip(errors, changes):
            errors[name].append(((change * weight).mean() / weight.mean()).item())
    return {name: mean(values) for name, values in errors.items()}


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, from the first to the last."""
    return torch.linspace(0, count - 1, min(count, most)).round().long().tolist()


def _mean_inside(values: Tensor, region: Tensor) -> float | None:
    return values[region].mean().item() if region.any() else None
