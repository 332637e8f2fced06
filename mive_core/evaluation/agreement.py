"""Agreement between raters: Krippendorff's alpha, as in "Computing Krippendorff's Alpha-Reliability" (Krippendorff, 2011)."""

from typing import Literal

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(ratings: np.ndarray, level: Level = "nominal") -> float | None:
    """ratings (raters, items), NaN where a rater has not rated an item -> alpha, 1: perfect agreement, 0: that of chance, below: systematic disagreement.

    `level` is the scale of the ratings: nominal (names), ordinal (ranks) or interval (numbers whose differences count). None where alpha is
    not defined: if no item has two ratings, or all ratings are equal.
    """
    ratings = np.asarray(ratings, dtype=float)
    ratings = ratings[:, (~np.isnan(ratings)).sum(axis=0) > 1]  # an item with one rating pairs with nothing
    values = np.unique(ratings[~np.isnan(ratings)])
    if len(values) < 2:
        return None
    counts = (ratings[None] == values[:, None, None]).sum(axis=1).astype(float)  # (values, items)
    per_item = counts.sum(axis=0)
    coincidences = (counts / (per_item - 1)) @ counts.T - np.diag((counts / (per_item - 1)).sum(axis=1))
    totals = coincidences.sum(axis=1)
    distances = _squared_distances(values, totals, level)
    expected = (np.outer(totals, totals) * distances).sum() / (totals.sum() - 1)
    return float(1 - (coincidences * distances).sum() / expected)


def _squared_distances(values: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    """Sorted values (V,) and how often each occurs (V,) -> (V, V)."""
    if level == "nominal":
        return 1 - np.eye(len(values))
    # Ordinal: the ratings that lie between two values, and half of those at either end.
    positions = np.cumsum(totals) - totals / 2 if level == "ordinal" else values
    return np.subtract.outer(positions, positions) ** 2
