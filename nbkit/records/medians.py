"""A median with how sure it is, for tables and verdicts. Needs no torch."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


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
