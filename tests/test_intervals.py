"""Shares, means, medians and ratios of medians with their intervals, against plain loops."""

import math

import numpy as np
import pytest
from scipy import stats

from nbkit.records.intervals import mean, median_interval, times, wilson


def test_the_ratio_and_its_interval_are_those_of_a_plain_loop():
    random = np.random.default_rng(0)
    large, small = random.lognormal(3, 1, 40), random.lognormal(0, 1, 50)
    found = times(large, small)
    assert found.ratio == pytest.approx(np.median(large) / np.median(small))
    drawn = [np.median(random.choice(large, 40)) / np.median(random.choice(small, 50)) for _ in range(2000)]
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.1)
    assert str(times([4.0, 4.0], [2.0, 2.0])) == "2-fold [2, 2]"
    assert np.isnan(times([4.0], [2.0, 2.0]).ratio)


def test_a_mean_has_wilson_s_interval_of_ones_and_zeros_and_a_bootstrap_s_of_others():
    expected = stats.binomtest(0, 10).proportion_ci(method="wilson")
    assert mean([0.0] * 10) == pytest.approx((0.0, expected.low, expected.high, 10))
    assert math.isnan(mean([0.2, 0.4]).low)
    values = np.random.default_rng(0).uniform(size=60)
    found = mean([*values, np.nan])
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 60)
    width = 1.96 * values.std(ddof=1) / 60**0.5
    assert [found.low, found.high] == pytest.approx([values.mean() - width, values.mean() + width], abs=0.01)
    assert np.isnan(mean([np.nan]).mean) and mean([]).n == 0


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (3, 8), (8, 8), (17, 36), (1, 1)])
def test_of_a_share_the_interval_is_scipy_s(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_of_means_over_prefixes_it_covers_at_least_as_often_as_it_says():
    random, p, n = np.random.default_rng(0), 0.8, 12
    means = random.binomial(3, p, (2000, n)).mean(1) / 3  # three prefixes a request
    covered = np.mean([low <= p <= high for low, high in (wilson(mean, n) for mean in means)])
    assert covered >= 0.95
    assert all(math.isnan(end) for end in wilson(math.nan, 0))


def test_medians_come_with_an_exact_interval():
    middle, low, high = median_interval([3, 1, 2, np.inf, 5, 4, 6])
    assert (middle, low, high) == (4, 1, np.inf)  # of seven, 1 - 2/2^7 lies between the extremes
    assert np.isnan(median_interval([1.0, 2.0])[1])
    with pytest.raises(ValueError, match="1 are NaN"):
        median_interval([1.0, np.nan])
