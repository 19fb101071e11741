"""Shares, means, medians and ratios of medians of what was measured, with their 95 % intervals. Needs no torch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST = 2  # values of a group, without which a ratio has no interval


class Mean(NamedTuple):
    """The mean of n values and its 95 % interval; NaN where there are too few."""

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


def wilson(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a mean of n values between 0 and 1; for a share of n, scipy's.

    Of values that are not only 0 and 1 (each a mean over prefixes, say) it is too wide rather than too narrow, since
    none in [0, 1] vary more than those. NaN for n = 0.
    """
    if not n:
        return np.nan, np.nan
    z = stats.norm.ppf((1 + level) / 2)
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return float(max(middle - reach, 0.0)), float(min(middle + reach, 1.0))


def mean(values: Sequence[float], seed: int = 0, n_resamples: int = 2000) -> Mean:
    """The mean of the values that are not NaN: with Wilson's interval of ones and zeros, a bootstrap's of others.

    A bootstrap of fewer than three values says nothing: the interval is NaN then.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n, middle = len(values), float(values.mean()) if len(values) else np.nan
    if np.isin(values, (0, 1)).all():
        return Mean(middle, *wilson(middle, n), n)
    if n < 3:
        return Mean(middle, np.nan, np.nan, n)
    drawn = np.random.default_rng(seed).choice(values, (n_resamples, n)).mean(1)
    return Mean(middle, *map(float, np.quantile(drawn, [0.025, 0.975])), n)


def student(values: Sequence[float], level: float = 0.95) -> Mean:
    """The mean of the values that are not NaN with Student's t interval: for a few means, such as one an order.

    The interval is NaN for fewer than two, and the mean itself where all are alike.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    n, middle = len(values), float(values.mean()) if len(values) else np.nan
    if n < 2 or np.ptp(values) == 0:
        return Mean(middle, *([middle if n > 1 else np.nan] * 2), n)
    return Mean(middle, *map(float, stats.t.interval(level, n - 1, middle, stats.sem(values))), n)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The median, and the exact interval of the population's median from the order of the values: no assumption.

    Infinite values count as the extremes that they are; NaN raises a ValueError. The interval's ends are NaN where the
    values are too few for the level (five, at 95 %).
    """
    numbers = np.asarray(values, float)
    if np.isnan(numbers).any() or not len(numbers):
        raise ValueError(f"a median needs numbers, and of {len(numbers)} values {np.isnan(numbers).sum()} are NaN")
    low, high = stats.quantile_test(numbers, p=0.5).confidence_interval(level)
    return float(np.median(numbers)), float(low), float(high)


def median_in_words(values: Sequence[float]) -> str:
    """ "0.108 [0.05, 0.3]": the median and its 95 % interval."""
    middle, low, high = median_interval(values)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


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
