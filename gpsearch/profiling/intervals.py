"""Medians, quantiles and their 95 % intervals; no assumption on the shape of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_T_975_4 = 2.7764
"""Student's t at 97.5 % with 4 degrees of freedom: the mean of five windows."""


def quantile(samples: Sequence[float], q: float = 0.5) -> float:
    """Return the sample quantile: a sample, or the mean of two where it falls between them."""
    return float(np.quantile(np.asarray(samples), q, method="averaged_inverted_cdf"))


def quantile_interval(samples: Sequence[float], q: float = 0.5) -> tuple[float, float] | None:
    """Return the 95 % interval of the ``q`` quantile, or None where the samples are too few.

    The number of samples below the true quantile is binomial(n, q), whatever the distribution; so
    two order statistics bracket it with a known probability.
    """
    ranks = _ranks(len(samples), q)
    if ranks is None:
        return None
    ordered = sorted(samples)
    return ordered[ranks[0] - 1], ordered[ranks[1] - 1]


def mean_of_five(samples: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the mean of five positive samples and its 95 % interval, by Student's t."""
    if len(samples) != 5:
        raise ValueError(f"five samples are wanted, not {len(samples)}")
    mean = float(np.mean(samples))
    half_width = _T_975_4 * float(np.std(samples, ddof=1)) / math.sqrt(5)
    return mean, (max(0.0, mean - half_width), mean + half_width)


@lru_cache(maxsize=1024)
def _ranks(n: int, q: float) -> tuple[int, int] | None:
    """Return the ranks l < u (from 1) with P(below l) <= 2.5 % and P(u or above) <= 2.5 %."""
    at_most = np.cumsum(_binomial(n, q))
    low = int(np.searchsorted(at_most, 0.025, side="right"))
    high = int(np.searchsorted(at_most, 0.975, side="left")) + 1
    return (low, high) if low >= 1 and high <= n else None


def _binomial(n: int, q: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return P(k of n) for k = 0..n; by logarithms, since n may be thousands."""
    log_choose = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)
    ]
    k = np.arange(n + 1)
    log_chances = np.asarray(log_choose) + k * math.log(q) + (n - k) * math.log1p(-q)
    chances: np.ndarray[tuple[int], np.dtype[np.float64]] = np.exp(log_chances)
    return chances
