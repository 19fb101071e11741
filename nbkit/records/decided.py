"""What an interval decides, and what it leaves open: medians with theirs, for tables and verdicts. Needs no torch."""

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


def below(low: float, high: float, bound: float) -> bool | None:
    """Whether an interval lies below a bound (True) or above it (False); None where it holds it, or is NaN."""
    return True if high < bound else False if low > bound else None


def unless(decided: bool | None) -> bool | None:
    """The opposite; what is open stays open."""
    return None if decided is None else not decided


def all_of(*parts: bool | None) -> bool | None:
    """Whether all hold: False as soon as one does not, None while one is open."""
    return False if False in parts else None if None in parts else True
