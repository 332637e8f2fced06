"""Source detail: gives an edit that was made small, and through a VAE, the source's own sharpness and size.

Per pixel and frame a local affine colour map leads from the source's VAE round trip to the edit, as in a guided filter (He et al. 2010).
Both carry the same blur, so the map holds the edit alone; it is applied to the sharp source. Where no such map explains the edit
(another shape, something new) the edit's own pixels stay. (ours) Maps are smooth, so those of a large edit are fitted at a reduced size
(He and Sun 2015, Fast Guided Filter).

F frames of the edit, h x w pixels; H x W pixels of the source.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 2e-3  # variance below which a map tends to the identity
RADIUS = 16  # the window's radius is the edit's shorter side divided by this
FIT_SIDE = 160  # shorter side, in pixels, of the size at which maps are fitted, at most
FRAMES = 1  # the window reaches that many frames to each side
HALO = 3 * FRAMES  # frames beside a frame that its map depends on: fit, smoothing, blend
PLANES = 2_000_000  # pixels that are averaged at a time: what stays in a processor's cache
NOISE = 0.06  # RMS change below which an edit is taken for the model's error, and the source stays
# Log-odds that the edit's pixel is nearer to the truth than the mapped source: weights of log(1e-4 + x), x being the map's residual (near
# and wide), the edit's variance (near) and the mapped source's variance (wide). A logistic regression, see embedded/detail_blend.py.
BLEND = (1.03, 0.67, -0.6, -0.77)
BLEND_BIAS = 2.58 + 0.8  # in favour of the edit: the source's ghost looks worse than a blur


def fit_color_maps(edited: Tensor, round_trip: Tensor) -> Tensor:
    """Fits the maps of consecutive frames of one shot.

    edited and round_trip (the source decoded from its latents), (F, h, w, 3) in 0..1 -> (F, 13, h, w): the matrix row by row, the offset,
    and the weight in 0..1 of the edit's own pixel.
    """
    e, g = edited.movedim(-1, 1), round_trip.movedim(-1, 1)
    matrix, offset = fit_affine_reduced(e, g)
    mapped = transform(matrix, g) + offset
    log_odds = sum(w * x for w, x in zip(BLEND, blend_features(e, mapped))) + BLEND_BIAS
    change = window_mean((mapped - g).square().mean(dim=1, keepdim=True), radii(e)[1])
    gain = change.square() / (change.square() + NOISE**4)
    identity = torch.eye(3, device=e.device, dtype=e.dtype).view(1, 9, 1, 1)
    return torch.cat([identity + gain * (matrix - identity), gain * offset, torch.sigmoid(log_odds)], dim=1)


def fit_affine_reduced(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """fit_affine of frames whose shorter side is at most FIT_SIDE; larger ones are reduced, and the result is enlarged."""
    size, shorter = e.shape[2:], min(e.shape[2:])
    if shorter <= FIT_SIDE:
        return fit_affine(e, g)
    reduced = [round(side * FIT_SIDE / shorter) for side in size]
    fitted = fit_affine(*(F.interpolate(x, reduced, mode="bilinear", antialias=True) for x in (e, g)))
    matrix, offset = (F.interpolate(x, size, mode="bilinear", align_corners=False) for x in fitted)
    return matrix, offset


def fit_affine(e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Local regression of e on g, (F, 3, h, w) twice, shrunk to the identity and averaged over the window -> (F, 9, h, w), (F, 3, h, w)."""
    radius = radii(e)[1]
    products = (e[:, :, None] * g[:, None]).flatten(1, 2), (g[:, :, None] * g[:, None]).flatten(1, 2)
    mean_e, mean_g, mean_eg, mean_gg = window_mean(torch.cat([e, g, *products], dim=1), radius).split((3, 3, 9, 9), dim=1)
    ridge = EPSILON * torch.eye(3, device=e.device, dtype=e.dtype).view(1, 9, 1, 1)
    covariance_eg = mean_eg - (mean_e[:, :, None] * mean_g[:, None]).flatten(1, 2) + ridge
    covariance_gg = mean_gg - (mean_g[:, :, None] * mean_g[:, None]).flatten(1, 2) + ridge
    matrix = multiply(covariance_eg, invert(covariance_gg))
    averaged = window_mean(torch.cat([matrix, mean_e - transform(matrix, mean_g)], dim=1), radius)
    return averaged[:, :9], averaged[:, 9:]


def blend_features(e: Tensor, mapped: Tensor) -> tuple[Tensor, ...]:
    """What tells that no map explains the edit: (F, 3, h, w) twice -> four logarithms, (F, 1, h, w) each."""
    near, wide = radii(e)
    residual = (e - mapped).square().mean(dim=1, keepdim=True)
    return tuple(torch.log(x + 1e-4) for x in (window_mean(residual, near), window_mean(residual, wide), variance(e, near), variance(mapped, wide)))


def radii(e: Tensor) -> tuple[int, int]:
    """(F, 3, h, w) -> radii of the near and the wide window, in pixels."""
    wide = max(2, round(min(e.shape[2:]) / RADIUS))
    return max(1, wide // 3), wide


def apply_color_map(maps: Tensor, source: Tensor, edited: Tensor) -> Tensor:
    """One frame: maps (13, h, w), the sharp source (H, W, 3), the edit (h, w, 3) -> (H, W, 3) in 0..1."""
    size = source.shape[:2]
    fields = torch.cat([maps, edited.movedim(-1, 0)])[None]
    fields = F.interpolate(fields, size, mode="bilinear", align_corners=False) if maps.shape[1:] != size else fields
    matrix, offset, weight, own = fields.split((9, 3, 1, 3), dim=1)
    detailed = transform(matrix, source.movedim(-1, 0)[None]) + offset
    return torch.lerp(detailed, own, weight)[0].movedim(0, -1).clamp(0, 1)


def window_mean(x: Tensor, radius: int) -> Tensor:
    """(F, C, h, w) -> the mean over windows of (2 radius + 1)^2 pixels and 2 FRAMES + 1 frames; at borders, over what lies inside."""
    num_frames, _, height, width = x.shape
    planes = x.flatten(0, 1).split(max(1, PLANES // (height * width)))
    x = torch.cat([window_sum(window_sum(part, radius, 2), radius, 1) for part in planes]).view_as(x)
    count = [window_sum(x.new_ones(n), radius, 0) for n in (height, width)]
    x /= count[0][:, None] * count[1]
    if num_frames == 1:
        return x
    total = x.clone()
    for distance in range(1, min(FRAMES, num_frames - 1) + 1):
        total[distance:] += x[:-distance]
        total[:-distance] += x[distance:]
    return total.div_(window_sum(x.new_ones(num_frames), FRAMES, 0).view(-1, 1, 1, 1))


def window_sum(x: Tensor, radius: int, dim: int) -> Tensor:
    """Sums over 2 radius + 1 neighbours along a dimension, in about 2 log2(radius) steps: sums over 1, 2, 4, ... are added as needed."""
    size, side = x.shape[dim], 2 * radius + 1
    x = F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [radius, radius])
    total, done, power = torch.zeros_like(x.narrow(dim, 0, size)), 0, 1
    while True:
        if side & power:
            total += x.narrow(dim, done, size)
            done += power
        if done == side:
            return total
        length = x.shape[dim] - power
        x, power = x.narrow(dim, 0, length) + x.narrow(dim, power, length), 2 * power


def variance(x: Tensor, radius: int) -> Tensor:
    """(F, C, h, w) -> (F, 1, h, w), the mean over channels of the variance over a window."""
    return (window_mean(x.square(), radius) - window_mean(x, radius).square()).clamp(min=0).mean(dim=1, keepdim=True)


def transform(matrix: Tensor, x: Tensor) -> Tensor:
    """3 x 3 matrices by pixel (F, 9, h, w), colours (F, 3, h, w) -> (F, 3, h, w)."""
    out = matrix[:, ::3] * x[:, :1]
    return out.addcmul_(matrix[:, 1::3], x[:, 1:2]).addcmul_(matrix[:, 2::3], x[:, 2:])


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of 3 x 3 matrices by pixel, (F, 9, h, w) twice -> (F, 9, h, w)."""
    return torch.cat([transform(a, b[:, column::3]) for column in range(3)], dim=1)[:, [0, 3, 6, 1, 4, 7, 2, 5, 8]]


def invert(m: Tensor) -> Tensor:
    """Inverses of 3 x 3 matrices by pixel, (F, 9, h, w), by cofactors: some fifty times faster than a solver on millions of them."""
    a, b, c, d, e, f, g, h, i = m.unbind(dim=1)
    first = e * i - f * h, c * h - b * i, b * f - c * e
    second = f * g - d * i, a * i - c * g, c * d - a * f
    third = d * h - e * g, b * g - a * h, a * e - b * d
    determinant = a * first[0] + b * second[0] + c * third[0]
    return torch.stack([*first, *second, *third], dim=1) / determinant[:, None]
