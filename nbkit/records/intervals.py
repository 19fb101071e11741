"""Means and ratios of medians of what was measured of edits, with 95 % intervals over them. Needs no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST = 2  # values of a group, without which it has no interval


class Mean(NamedTuple):
    """The mean of n values and its 95 % interval; all NaN of none."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}], n = {self.n}" if self.n else "n = 0"


class Times(NamedTuple):
    """A ratio of two medians and its 95 % bootstrap interval; NaN where a group has fewer than two values."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return "too few" if np.isnan(self.ratio) else f"{self.ratio:.3g}-fold [{self.low:.3g}, {self.high:.3g}]"


def mean(values: Sequence[float], seed: int = 0, n_resamples: int = 2000) -> Mean:
    """The mean of the values that are not NaN: with Wilson's interval of ones and zeros, a bootstrap's of others."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return Mean(np.nan, np.nan, np.nan, 0)
    if np.isin(values, (0, 1)).all():
        found = stats.binomtest(int(values.sum()), n).proportion_ci(method="wilson")
        return Mean(float(values.mean()), float(found.low), float(found.high), n)
    drawn = np.random.default_rng(seed).choice(values, (n_resamples, n)).mean(1)
    return Mean(float(values.mean()), *map(float, np.quantile(drawn, [0.025, 0.975])), n)


def times(of: Sequence[float], than: Sequence[float], seed: int = 0, n_resamples: int = 2000) -> Times:
    """The median of `of` over that of `than`; both groups are resampled, each among itself."""
    pair = [np.asarray(values, float) for values in (of, than)]
    if min(map(len, pair)) < FEWEST:
        return Times(np.nan, np.nan, np.nan)
    found = stats.bootstrap(
        pair, _ratio, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Times(float(_ratio(*pair)), float(found.low), float(found.high))


def _ratio(of: np.ndarray, than: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(of, axis) / np.median(than, axis)
