"""HDR video (PQ or HLG, BT.2020) -> the range and primaries of a standard display.

Transfer functions: ITU-R BT.2100-2. Compression of highlights: the EETF of ITU-R BT.2390-10, section 5.4, on the largest of R, G and B, so that hues
stay. White of a standard display: ITU-R BT.2408-7. H x W pixels; light is in cd/m2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WHITE = 203.0  # cd/m2 of a standard display's white in HDR
PEAK = 1000.0  # cd/m2 that the highlights are mastered for
DISPLAY_GAMMA = 2.4  # of BT.1886
HLG_GAMMA = 1.2  # system gamma of HLG at PEAK
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
BT2020_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32)
M1, M2, C1, C2, C3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32  # of PQ
A, B, C = 0.17883277, 0.28466892, 0.55991073  # of HLG


def pq_to_light(signal: np.ndarray) -> np.ndarray:
    """PQ's EOTF: 0..1 -> 0..10,000 cd/m2."""
    power = np.power(signal, 1 / M2)
    return 10_000 * np.power(np.maximum(power - C1, 0) / (C2 - C3 * power), 1 / M1)


def light_to_pq(light: np.ndarray) -> np.ndarray:
    """Inverse of pq_to_light."""
    power = np.power(np.maximum(light, 0) / 10_000, M1)
    return np.power((C1 + C2 * power) / (1 + C3 * power), M2)


def hlg_to_light(signal: np.ndarray) -> np.ndarray:
    """HLG's EOTF for a display of PEAK: (..., 3) in 0..1 -> cd/m2."""
    scene = np.where(signal <= 0.5, np.square(signal) / 3, (np.exp((signal - C) / A) + B) / 12)
    luminance = (scene @ LUMA_2020)[..., None]
    return PEAK * np.power(np.maximum(luminance, 1e-6), HLG_GAMMA - 1) * scene


@dataclass(frozen=True)
class Transfer:
    """A transfer function of HDR video, by the name that people know it by."""

    name: str
    to_light: Callable[[np.ndarray], np.ndarray]
    method = "BT.2390"


TRANSFERS = {16: Transfer("PQ", pq_to_light), 18: Transfer("HLG", hlg_to_light)}  # by ISO/IEC 23091-2's number


def to_standard_range(pixels: np.ndarray, transfer: Transfer) -> np.ndarray:
    """(H, W, 3 or 4) uint16, BT.2020 -> (H, W, 3 or 4) float32 in 0..1, BT.709 with gamma 2.4. Alpha stays."""
    values = pixels.astype(np.float32) / 65535
    light = transfer.to_light(values[..., :3])
    largest = light.max(axis=-1, keepdims=True)
    mapped = (light * (compress(largest) / np.maximum(largest, 1e-6))) @ BT2020_TO_BT709.T / WHITE
    colours = np.power(np.clip(mapped, 0, 1), 1 / DISPLAY_GAMMA)
    return np.concatenate([colours, values[..., 3:]], axis=-1).astype(np.float32)


def compress(light: np.ndarray) -> np.ndarray:
    """BT.2390's EETF: 0..PEAK cd/m2 -> 0..WHITE. Darker than its knee, near 90 cd/m2, nothing changes."""
    peak, largest = light_to_pq(np.array(PEAK)), light_to_pq(np.array(WHITE))
    share, limit = np.minimum(light_to_pq(light) / peak, 1), largest / peak
    knee = 1.5 * limit - 0.5
    t = (share - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * limit
    return pq_to_light(np.where(share < knee, share, spline) * peak)
