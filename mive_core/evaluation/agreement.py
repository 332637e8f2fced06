"""Agreement between readings: Krippendorff's alpha."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

LEVELS = ("interval", "ordinal")


def krippendorff_alpha(units: Sequence[Sequence[float | None]], level: str = "interval") -> float | None:
    """Alpha of the readings of each unit, None for a missing one: 1 for perfect agreement, 0 for chance, below 0 for less than chance.

    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011). `ordinal` compares ranks: its difference of two values, half of the
    values tied with each and all those between, is the difference of their mean ranks. None if fewer than two values can be paired, or if
    all are equal.
    """
    paired = [[value for value in unit if value is not None] for unit in units]
    paired = [unit for unit in paired if len(unit) > 1]
    sizes = np.array([len(unit) for unit in paired])
    values = np.array([value for unit in paired for value in unit], dtype=float)
    if level == "ordinal":
        values = rankdata(values)
    if not len(values) or np.ptp(values) == 0:
        return None
    by_unit = np.split(values, np.cumsum(sizes)[:-1])
    observed = sum(_squared_differences(unit) / (len(unit) - 1) for unit in by_unit) / len(values)
    expected = _squared_differences(values) / (len(values) * (len(values) - 1))
    return float(1 - observed / expected)


def _squared_differences(values: np.ndarray) -> float:
    """The sum over all ordered pairs."""
    return 2 * len(values) ** 2 * float(np.var(values))
