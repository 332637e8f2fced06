"""Registration of the reference to the source's first frame. (ours)

Image editors shift, zoom and recompress what they return. A transform (zoom, x, y) leads from a place of the frame to the place
zoom * place + (x, y) of the reference; places run from -1 to 1 along each axis, so a transform holds at every size. Edges are compared, since
they survive changes of colour, and a transform is taken only if it also improves parts of the picture that it was not fitted to.

H x W pixels of both images, h x w of their edges, P points.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IDENTITY = torch.tensor([1.0, 0.0, 0.0])
SEARCH_SIDE, FINE_SIDE = 320, 960  # longer side of the edges, in pixels: for the search, for the last fit
ZOOMS = [0.92 + 0.01 * step for step in range(17)]
MAX_SHIFT = 0.2  # in places: a tenth of a side
INNER = 0.9  # the compared part of each axis: near the borders a moved reference has nothing to show
CELLS = 12  # of the grid of local contrast, along each axis
NUM_POINTS, TILES = 30_000, 8  # points that are compared; tiles along each axis, of which every other one is held out
STEPS, SCALE = 20, 0.5  # of the robust fit; half the weight is gone at about SCALE standard deviations of the residual
MIN_GAIN, MIN_CORRELATION = 0.05, 0.28  # of held-out edges; those of unrelated pictures have reached 0.25
SAME_SHIFT, SAME_ZOOM = 0.25, 0.002  # pixels of the full size, and relative size, below which nothing moved


def register(reference: Tensor, frame: Tensor, beyond: Tensor | None = None) -> Tensor:
    """The reference moved over the frame by a zoom and a shift, (H, W, 3) in 0..1 each; the same tensor where it fits already.

    beyond: stands in where the moved reference shows nothing; without it the reference's border is repeated.
    """
    levels = [(edges(frame, side), edges(reference, side)) for side in (SEARCH_SIDE, FINE_SIDE)]
    if min(x.abs().max() for x in levels[0]) < 1e-3:  # flat
        return reference
    found = search(*levels[0])
    uniform = torch.rand(NUM_POINTS, 2, generator=torch.Generator().manual_seed(0))
    points, black = (2 * uniform - 1) * INNER, (uniform * TILES).long().sum(dim=1) % 2 == 1  # tiles of a checkerboard
    for fitted in (black, ~black):
        before, after = (correlation(*levels[1], points[~fitted], t) for t in (IDENTITY, refine(levels, points[fitted], found)))
        if after - before < MIN_GAIN or after < MIN_CORRELATION:
            return reference
    transform = refine(levels, points, found)
    pixels = transform[1:].abs() * torch.tensor([frame.shape[1] / 2, frame.shape[0] / 2])
    fits = pixels.max() < SAME_SHIFT and abs(transform[0] - 1) < SAME_ZOOM
    return reference if fits else warp(reference, transform, beyond)


def edges(image: Tensor, side: int) -> Tensor:
    """(H, W, 3) -> (1, 1, h, w) with the longer side at most `side`: the gradient's magnitude with local mean 0 and local variance 1."""
    x = image.movedim(-1, 0)[None].float()
    scale = min(1.0, side / max(x.shape[2:]))
    x = F.interpolate(x, [max(1, round(n * scale)) for n in x.shape[2:]], mode="bilinear", antialias=True)
    magnitude = sum(d.square().sum(dim=1, keepdim=True) for d in _differences(x)).sqrt().cpu()
    local_mean = lambda x: F.interpolate(F.adaptive_avg_pool2d(x, CELLS), x.shape[2:], mode="bilinear", align_corners=False)
    centred = magnitude - local_mean(magnitude)
    return centred / (local_mean(centred.square()) + 0.1 * centred.square().mean() + 1e-6).sqrt()


def search(fixed: Tensor, moving: Tensor, zooms: Sequence[float] = ZOOMS, max_shift: float = MAX_SHIFT) -> Tensor:
    """Edges of the frame and of the reference -> the transform of the best correlation: phase correlation over a grid of zooms."""
    from skimage.registration import phase_cross_correlation  # ComfyUI starts without scikit-image

    height, width = fixed.shape[2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)
    points = places(height, width).view(-1, 2)
    candidates = [IDENTITY]
    for zoom in zooms:
        zoomed = sample(moving, points, zoom * IDENTITY).view(height, width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an error that it cannot state where one of the two is empty
            rows, columns = phase_cross_correlation((fixed[0, 0] * window).numpy(), (zoomed * window).numpy())[0]
        candidates.append(zoom * torch.tensor([1.0, -2 * float(columns) / width, -2 * float(rows) / height]))
    inner = points[(points.abs() < INNER).all(dim=1)]
    return max((t for t in candidates if t[1:].abs().max() < max_shift), key=lambda t: correlation(fixed, moving, inner, t))


def refine(levels: list[tuple[Tensor, Tensor]], points: Tensor, transform: Tensor) -> Tensor:
    """Edges of frame and reference at growing sizes -> the transform with the least error at points (P, 2), from the given one on.

    Gauss-Newton on transform, gain and offset of the edges; what the edit changed weighs little (Geman-McClure).
    """
    for fixed, moving in levels:
        dx, dy = _differences(moving)
        stack = torch.cat([moving, dx * moving.shape[3] / 2, dy * moving.shape[2] / 2], dim=1)
        target, ones = sample(fixed, points, IDENTITY)[0], torch.ones(len(points))
        for _ in range(STEPS):
            value, by_x, by_y = sample(stack, points, transform)
            centred = value - value.mean()
            residual = target - target.mean() - centred * (centred @ target) / (centred @ centred + 1e-6)
            weight = 1 / (1 + (residual / (SCALE * residual.std() + 1e-6)).square()).square()
            jacobian = torch.stack([by_x * points[:, 0] + by_y * points[:, 1], by_x, by_y, value, ones])
            system = jacobian * weight @ jacobian.T
            damped = system + (1e-6 * system.diagonal().mean() + 1e-9) * torch.eye(5)
            *step, gain, _ = torch.linalg.solve(damped, jacobian * weight @ target)
            if gain < 1e-3:  # the edges do not correlate here
                break
            transform = transform + (torch.stack(step) / gain).clamp(-0.02, 0.02)
    return transform


def correlation(fixed: Tensor, moving: Tensor, points: Tensor, transform: Tensor) -> float:
    """Normalised correlation of the frame's edges at points (P, 2) with the reference's at the transformed points."""
    a, b = (x - x.mean() for x in (sample(fixed, points, IDENTITY)[0], sample(moving, points, transform)[0]))
    return float((a * b).mean() / ((a.square().mean() * b.square().mean()).sqrt() + 1e-6))


def warp(image: Tensor, transform: Tensor, beyond: Tensor | None = None) -> Tensor:
    """(H, W, 3) in 0..1 -> the image at the transformed places, bicubic; past its border `beyond`, or the border repeated."""
    grid = (transform[0] * places(*image.shape[:2]) + transform[1:]).to(image)
    moved = F.grid_sample(image.movedim(-1, 0)[None], grid[None], mode="bicubic", padding_mode="border", align_corners=False)
    moved = moved[0].movedim(0, -1).clamp(0, 1)
    return moved if beyond is None else torch.where(grid.abs().amax(dim=-1, keepdim=True) > 1, beyond, moved)


def sample(x: Tensor, points: Tensor, transform: Tensor) -> Tensor:
    """(1, C, h, w) at the transformed points (P, 2) -> (C, P)."""
    grid = (transform[0] * points + transform[1:])[None, None]
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]


def places(height: int, width: int) -> Tensor:
    """-> (height, width, 2): x and y of each pixel's centre."""
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences along x and y, (N, C, h, w) -> the same shape twice."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2]) / 2, (x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]) / 2
