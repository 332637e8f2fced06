"""Statistics of paired comparisons. S systems, C clips."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest

CONFIDENCE = 0.95
TOLERANCE, MAX_ITERATIONS = 1e-10, 100_000  # of bradley_terry, in log strengths


def wilson_interval(num_wins: int, num_decided: int) -> tuple[float, float] | None:
    """The 95 % score interval of a share (Wilson, 1927); None without a decision."""
    if not num_decided:
        return None
    interval = binomtest(num_wins, num_decided).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def sign_test(num_wins: int, num_losses: int) -> float | None:
    """Two-sided p of as unequal a split, if both were equally likely; None without a decision."""
    return float(binomtest(num_wins, num_wins + num_losses).pvalue) if num_wins + num_losses else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values of several tests -> corrected so that any false finding is as unlikely as in one test (Holm, 1979). None stays."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected


def bradley_terry(wins: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """wins (..., S, S), how often the row's system beat the column's -> log strengths (..., S) of mean 0.

    The odds of one system against another are e to the difference. `prior` wins are added to both sides of each pair; without them the
    strength of a system that never lost is infinite. By the MM algorithm (Hunter, 2004, "MM algorithms for generalized Bradley-Terry models").
    """
    wins = wins + prior * (1 - np.eye(wins.shape[-1]))
    total, games = wins.sum(axis=-1), wins + wins.swapaxes(-1, -2)
    logs = np.zeros(total.shape)
    for _ in range(MAX_ITERATIONS):
        strengths = np.exp(logs)
        updated = np.log(total / (games / (strengths[..., :, None] + strengths[..., None, :])).sum(axis=-1))
        updated -= updated.mean(axis=-1, keepdims=True)
        change = np.abs(updated - logs).max()
        logs = updated
        if change < TOLERANCE:
            break
    return logs


def resampled_clips(num_clips: int, num_samples: int, seed: int = 0) -> np.ndarray:
    """(num_samples, C): how often each clip is drawn in each bootstrap sample."""
    return np.random.default_rng(seed).multinomial(num_clips, np.full(num_clips, 1 / num_clips), size=num_samples)


def percentile_interval(samples: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval of bootstrap samples (N,); NaN, a sample without the figure, is left out."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return None
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
