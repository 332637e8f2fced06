"""Paired comparisons of the layer study's arms: bootstrap over clips and seeds.

An arm's outcomes are an array (seeds, clips): one number for each run and held-out clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_SAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval of LEVEL, and the two-sided p-value of the bootstrap."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(first: np.ndarray, second: np.ndarray, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Difference:
    """Compares two arms, first minus second, on the same clips: (seeds, N) and (other seeds, N) without NaN.

    Clips are drawn with replacement for both arms together, seeds for each arm on its own, since the runs of two arms are not paired.
    """
    rng = np.random.default_rng(seed)
    num_clips = first.shape[1]
    clips = rng.multinomial(num_clips, [1 / num_clips] * num_clips, size=num_samples) / num_clips  # weights of each sample's clips
    one, other = (_resampled(arm, clips, rng) for arm in (first, second))
    means = one - other
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Difference(float(first.mean() - second.mean()), float(low), float(high), min(1.0, 2 * max(float(tail), 1 / num_samples)))


def _resampled(arm: np.ndarray, clips: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An arm (seeds, N) and weights of clips (M, N) -> M means, each over seeds that are drawn with replacement."""
    seeds = rng.multinomial(len(arm), [1 / len(arm)] * len(arm), size=len(clips)) / len(arm)
    return ((clips @ arm.T) * seeds).sum(axis=1)


def interval(arm: np.ndarray, num_samples: int = NUM_SAMPLES, seed: int = 0) -> tuple[float, float]:
    """The interval of LEVEL of an arm's mean, (seeds, N) without NaN, by the same bootstrap."""
    rng = np.random.default_rng(seed)
    clips = rng.multinomial(arm.shape[1], [1 / arm.shape[1]] * arm.shape[1], size=num_samples) / arm.shape[1]
    low, high = np.quantile(_resampled(arm, clips, rng), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def standardised_loss(damaged: Sequence[np.ndarray], whole: Sequence[np.ndarray], higher_is_better: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Several outcomes (seeds, N) of two arms -> their means in units of the damaged arm's spread over clips, lower is better.

    The difference of the two results is the standardised loss by the damage. The mean over seeds comes before the spread. An outcome that
    does not vary over clips is left out; zeros where none does.
    """
    losses, bases = [], []
    for one, other, better in zip(damaged, whole, higher_is_better, strict=True):
        spread = one.mean(axis=0).std()
        if spread:
            sign = -1.0 if better else 1.0
            losses.append(sign * one / spread)
            bases.append(sign * other / spread)
    if not losses:
        return np.zeros_like(damaged[0]), np.zeros_like(whole[0])
    return np.mean(losses, axis=0), np.mean(bases, axis=0)


def answer(where: Difference, difference: Difference, small: float = 0.5) -> str:
    """Answers the study's question from the loss in WHERE, and that loss minus the loss in WHAT: yes, no or cannot tell."""
    if difference.low > 0 and where.low > 0:
        return "yes"
    if difference.high < 0 or (where.low <= 0 and where.high < small):
        return "no"
    return "cannot tell"
