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

from .detail import radii, transform, window_mean

NUM_NODES, NUM_ERROR_NODES = 17, 9
SMOOTHNESS = 1e-4  # weight of the LUT's second differences against its error
MAX_PIXELS = 40_000  # drawn from each half of frame 0
PRIOR_SAMPLES = 3.0  # of a colour: with fewer, the LUT is not trusted there
SHOWN = 0.04  # change of a local mean from which a reference shows an edit; a JPEG of quality 25 changes them by half of that
TOLERANCE = 0.003  # mean squared disagreement of LUT and edit that is never held against the LUT
STRONG, MIN_STRONG, MIN_SHARE = 0.1, 0.005, 0.5  # change of an edit beyond doubt; its share of the frame; share of it that a reference shows
UNEDITED, MIN_UNEDITED = 0.02, 0.6  # RMS change by the maps up to which a pixel is unedited; share of the frame that has to be
SAME, CLIPPED = 0.01, 1 / 255  # gain and offset below which there is no cast; distance from 0 and 1 at which a channel is clipped
MIN_CONTRAST = 6.0  # error of a cast in the edited part against that in the rest; weak looks have 2 at most, casts beside an edit 30 and more


@dataclass(frozen=True)
class Anchor:
    """The LUT and how far to trust it, by source colour."""

    lut: Tensor  # (N, N, N, 5) edited colour minus source colour; held-out squared error of the LUT and squared error of the edit
    disagreement: Tensor  # (M, M, M, 1) squared difference of LUT and edit at the edit's size


def fit_anchor(source: Tensor, detailed: Tensor, reference: Tensor, round_trip: Tensor, edited: Tensor, noise: float = 0.0) -> Anchor:
    """Frame 0: the source, the edit with the source's detail and the registered reference, (H, W, 3) each; the small ones (h, w, 3).

    Several edited frames stand one below the other.

    noise: of the reference, a mean squared error, which is held against the LUT.
    """
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
    errors[..., 0] += 2 * noise
    return Anchor(torch.cat([lut, errors], dim=-1).to(source), expected.to(source))


def apply_anchor(anchor: Anchor, source: Tensor, detailed: Tensor, round_trip: Tensor, edited: Tensor) -> Tensor:
    """One frame, in the shapes of fit_anchor -> (H, W, 3) in 0..1."""
    excess = _disagreement(anchor.lut[..., :3], round_trip, edited) - 4 * lookup(anchor.disagreement, round_trip)[..., 0] - TOLERANCE
    excess = F.interpolate(excess.clamp(min=0)[None, None], source.shape[:2], mode="bilinear", align_corners=False)[0, 0, :, :, None]
    change, error_lut, error_edit = lookup(anchor.lut, source).split((3, 1, 1), dim=-1)
    error_lut, error_edit = (error_lut + excess).square(), error_edit.square()
    return torch.lerp(detailed, source + change, error_edit / (error_edit + error_lut + 1e-12)).clamp(0, 1)


def lacks_edit(reference: Tensor, frame: Tensor, round_trip: Tensor, edited: Tensor) -> bool:
    """Whether a registered reference, (H, W, 3) as the source's first frame, changes little where the edit (h, w, 3) changes much.

    Words alone asked for such an edit, and a reference that was recompressed or tinted would undo it.
    """
    small = F.interpolate((reference - frame).movedim(-1, 0)[None], edited.shape[:2], mode="bilinear", antialias=True)
    change = (edited - round_trip).movedim(-1, 0)[None]
    shown, made = (window_mean(x, radii(change)[0]).square().mean(dim=1) for x in (small, change))
    strong = made > STRONG**2
    return bool(strong.float().mean() > MIN_STRONG and shown[strong].mean() < MIN_SHARE**2 * made[strong].mean())


def shows_edit(reference: Tensor, first_frame: Tensor) -> bool:
    """Whether a registered reference differs from the source's first frame, (H, W, 3) each, by more than what storing a picture changes."""
    difference = (reference - first_frame).movedim(-1, 0)[None]
    change = window_mean(difference, max(2, first_frame.shape[0] // 32)).abs().amax(dim=1).flatten()
    return bool(change.kthvalue(max(1, round(0.998 * len(change)))).values > SHOWN)


def restore(reference: Tensor, frame: Tensor, detailed: Tensor, maps: Tensor, round_trip: Tensor) -> tuple[Tensor, float]:
    """The registered reference without what an image editor did to the whole picture: a colour cast, and the noise of a JPEG.

    The reference, the source's first frame and the edit with the source's detail, (H, W, 3); frame 0's colour maps (13, h, w) and round trip
    (h, w, 3). A cast is a gain and an offset per channel, fitted where the maps leave the source as it is. That must be most of the frame,
    and the reference may show hardly anything else there, but must in the rest; otherwise the cast may be the edit, and the same tensor comes
    back. The source stands in where nothing but the cast changed it, and `detailed` where the cast clipped what the reference showed.
    Second comes the noise that was found, a mean squared error.
    """
    small = round_trip.movedim(-1, 0)[None]
    change = transform(maps[None, :9], small) + maps[None, 9:12] - small
    unedited = (change.square().mean(dim=1) < UNEDITED**2).flatten()
    clipped = (reference > 1 - CLIPPED).to(frame) - (reference < CLIPPED).to(frame)
    stack = torch.cat([reference, frame, clipped], dim=-1).movedim(-1, 0)[None]
    stack = F.interpolate(stack, small.shape[2:], mode="bilinear", antialias=True)
    x, y, side = window_mean(stack, radii(small)[0])[0].flatten(1).split(3)
    candidates = kept = unedited & (side.abs().amax(dim=0) < 0.01)
    if unedited.float().mean() < MIN_UNEDITED or unedited.all() or kept.float().mean() < MIN_UNEDITED / 10:
        return reference, 0.0
    for _ in range(5):
        mean_x, mean_y = (z[:, kept].mean(dim=1, keepdim=True) for z in (x, y))
        covariance, variance = (((x - mean_x) * z)[:, kept].mean(dim=1, keepdim=True) for z in (y - mean_y, x - mean_x))
        gain = (covariance + 1e-5) / (variance + 1e-5)  # near 1 where the colours hardly vary
        offset = mean_y - gain * mean_x
        away = y - gain * x - offset
        away = torch.where(side > 0.01, away.clamp(max=0), torch.where(side < -0.01, away.clamp(min=0), away))  # beyond a clipped value is no error
        error = away.square().mean(dim=0)
        kept = candidates & (error <= 6 * error[kept].mean() + 1e-12)
    if error[~unedited].mean().sqrt() < MIN_CONTRAST * (error[kept].mean().sqrt() + 1e-3):
        return reference, 0.0
    same = F.interpolate(kept.to(frame).view(1, 1, *small.shape[2:]), frame.shape[:2], mode="bilinear", align_corners=False)[0, 0, :, :, None]
    is_cast = max((gain - 1).abs().max(), offset.abs().max()) > SAME
    restored = torch.where(clipped != 0, detailed, (reference * gain[:, 0] + offset[:, 0]).clamp(0, 1)) if is_cast else reference
    noise = ((restored - frame).square() * same).mean() / same.mean()
    return torch.lerp(restored, frame, same), float(noise)


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
