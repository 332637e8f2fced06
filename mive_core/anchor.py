"""The anchor: what the reference shows of frame 0 corrects the colours of every frame. (ours)

The reference is the truth of frame 0. A 3D lookup table (LUT) from source colour to edited colour is learned there, and taken in every
frame at the colours where it foretold held-out parts of frame 0 better than the edit itself: whole looks and recoloured objects, but
not colours that the edit treats in two ways, nor colours that frame 0 does not hold.

H x W pixels; N nodes per axis of the LUT, M per axis of the error tables.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
import torch
from scipy.sparse.linalg import cg
from torch import Tensor
from torch.nn import functional as F

from .detail import radii, window_mean

NUM_NODES, NUM_ERROR_NODES = 17, 9
SMOOTHNESS = 1e-4  # weight of the LUT's second differences against its error
MAX_PIXELS = 40_000  # drawn from each half of frame 0
PRIOR_SAMPLES = 3.0  # of a colour: with fewer, the LUT is not trusted there
SHOWN = 0.04  # change of a local mean from which a reference shows an edit; a JPEG of quality 25 changes them by half of that
TOLERANCE = 0.003  # mean squared disagreement of LUT and edit that is never held against the LUT


@dataclass(frozen=True)
class Anchor:
    """The LUT and how far to trust it, by source colour."""

    lut: Tensor  # (N, N, N, 5) edited colour minus source colour; held-out squared error of the LUT and squared error of the edit
    disagreement: Tensor  # (M, M, M, 1) squared difference of LUT and edit at the edit's size


def fit_anchor(source: Tensor, detailed: Tensor, reference: Tensor, round_trip: Tensor, edited: Tensor) -> Anchor:
    """Frame 0: the source, the edit with the source's detail and the registered reference, (H, W, 3) each; the small ones (h, w, 3)."""
    height, width, _ = source.shape
    s, truth, edit = (x.reshape(-1, 3).cpu() for x in (source, reference, detailed))
    block = max(4, height // 12)
    checker = (torch.arange(height)[:, None] // block + torch.arange(width) // block).flatten() % 2
    generator = torch.Generator().manual_seed(0)
    halves = [_draw((checker == half).nonzero()[:, 0], generator) for half in (0, 1)]
    squared = []
    for train, test in (halves, halves[::-1]):
        predicted = s[test] + lookup(fit_lut(s[train], truth[train] - s[train]), s[test])
        squared.append(torch.stack([(predicted - truth[test]).square().mean(-1), (edit[test] - truth[test]).square().mean(-1)], dim=1))
    drawn = torch.cat(halves)
    lut = fit_lut(s[drawn], truth[drawn] - s[drawn])
    colours = torch.cat(halves[::-1])
    by_error = _table(s[colours], torch.cat(squared))
    small = round_trip.reshape(-1, 3).cpu()
    disagreement = _disagreement(lut, round_trip.cpu(), edited.cpu()).reshape(-1, 1)
    # few samples of a colour: the LUT's error there is taken for four times the edit's mean error
    worst = torch.tensor([4.0, 1.0]) * by_error[..., 1].sum() / by_error[..., 2].sum()
    errors = (by_error[..., :2] + PRIOR_SAMPLES * worst) / (by_error[..., 2:] + PRIOR_SAMPLES)
    count = _table(small, disagreement)
    expected = (count[..., :1] + PRIOR_SAMPLES * disagreement.mean()) / (count[..., 1:] + PRIOR_SAMPLES)
    errors = F.interpolate(errors.movedim(-1, 0)[None], (NUM_NODES,) * 3, mode="trilinear", align_corners=True)[0].movedim(0, -1)
    return Anchor(torch.cat([lut, errors], dim=-1).to(source), expected.to(source))


def apply_anchor(anchor: Anchor, source: Tensor, detailed: Tensor, round_trip: Tensor, edited: Tensor) -> Tensor:
    """One frame, in the shapes of fit_anchor -> (H, W, 3) in 0..1."""
    excess = _disagreement(anchor.lut[..., :3], round_trip, edited) - 4 * lookup(anchor.disagreement, round_trip)[..., 0] - TOLERANCE
    excess = F.interpolate(excess.clamp(min=0)[None, None], source.shape[:2], mode="bilinear", align_corners=False)[0, 0, :, :, None]
    change, error_lut, error_edit = lookup(anchor.lut, source).split((3, 1, 1), dim=-1)
    error_lut, error_edit = (error_lut + excess).square(), error_edit.square()
    return torch.lerp(detailed, source + change, error_edit / (error_edit + error_lut + 1e-12)).clamp(0, 1)


def shows_edit(reference: Tensor, first_frame: Tensor) -> bool:
    """Whether a registered reference differs from the source's first frame, (H, W, 3) each, by more than what storing a picture changes."""
    difference = (reference - first_frame).movedim(-1, 0)[None]
    return bool(window_mean(difference, max(2, first_frame.shape[0] // 32)).abs().amax(dim=1).flatten().quantile(0.998) > SHOWN)


def fit_lut(colours: Tensor, values: Tensor) -> Tensor:
    """Smoothed least squares: colours (P, 3) in 0..1 and their values (P, 3) -> (N, N, N, 3)."""
    basis = _basis(colours, NUM_NODES)
    system = basis.T @ basis / len(colours) + SMOOTHNESS * _second_differences(NUM_NODES) + 1e-6 * sparse.identity(NUM_NODES**3)
    right = basis.T @ values.double().numpy() / len(colours)
    jacobi = sparse.diags(1 / system.diagonal())
    columns = [cg(system, right[:, channel], rtol=1e-4, maxiter=200, M=jacobi)[0] for channel in range(3)]
    return torch.from_numpy(np.stack(columns, axis=1)).float().view(NUM_NODES, NUM_NODES, NUM_NODES, 3)


def lookup(table: Tensor, colours: Tensor) -> Tensor:
    """Trilinear: (N, N, N, C), colours (..., 3) in 0..1 -> (..., C)."""
    grid = colours.reshape(1, 1, 1, -1, 3).flip(-1) * 2 - 1
    found = F.grid_sample(table.movedim(-1, 0)[None], grid.to(table), mode="bilinear", padding_mode="border", align_corners=True)
    return found[0, :, 0, 0].T.reshape(*colours.shape[:-1], table.shape[-1])


def _disagreement(lut: Tensor, round_trip: Tensor, edited: Tensor) -> Tensor:
    """Local mean squared difference of the LUT's colours and the edit's, (h, w, 3) twice -> (h, w)."""
    difference = (round_trip + lookup(lut, round_trip) - edited).square().mean(dim=-1)[None, None]
    return window_mean(difference, radii(difference)[0])[0, 0]


def _draw(indices: Tensor, generator: torch.Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)[:MAX_PIXELS]]


def _table(colours: Tensor, values: Tensor) -> Tensor:
    """Sums of values (P, C) by colour, and last how many there are, each averaged with its neighbours -> (M, M, M, C + 1)."""
    basis = _basis(colours, NUM_ERROR_NODES)
    columns = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
    sums = torch.from_numpy(basis.T @ columns.double().numpy()).float().T.reshape(1, -1, *(NUM_ERROR_NODES,) * 3)
    return F.avg_pool3d(F.pad(sums, (1,) * 6, mode="replicate"), 3, 1)[0].movedim(0, -1)


def _basis(colours: Tensor, num_nodes: int) -> sparse.csr_matrix:
    """Trilinear weights of the nodes around each colour: (P, 3) in 0..1 -> (P, num_nodes^3)."""
    position = colours.clamp(0, 1).double().numpy() * (num_nodes - 1)
    corner = np.minimum(position.astype(np.int64), num_nodes - 2)
    inside = position - corner
    offsets = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 1, 3)
    weights = np.where(offsets, inside, 1 - inside).prod(axis=-1)
    nodes = (corner + offsets) @ np.array([num_nodes**2, num_nodes, 1])
    rows = np.broadcast_to(np.arange(len(position)), weights.shape)
    return sparse.csr_matrix((weights.ravel(), (rows.ravel(), nodes.ravel())), shape=(len(position), num_nodes**3))


def _second_differences(num_nodes: int) -> sparse.csr_matrix:
    """The squared second differences along each axis, as a quadratic form on the nodes."""
    line = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(num_nodes - 2, num_nodes))
    form, one = line.T @ line, sparse.identity(num_nodes)
    axes = ((form, one, one), (one, form, one), (one, one, form))
    return sum(sparse.kron(sparse.kron(a, b), c) for a, b, c in axes).tocsr() * (num_nodes - 1) ** 3 / 1000
