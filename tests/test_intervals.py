"""Means and ratios of medians with their intervals, against plain loops."""

import numpy as np
import pytest
from scipy import stats

from nbkit.records.intervals import mean, times


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
    wilson = stats.binomtest(0, 10).proportion_ci(method="wilson")
    assert mean([0.0] * 10) == (0.0, wilson.low, wilson.high, 10)
    values = np.random.default_rng(0).uniform(size=60)
    found = mean([*values, np.nan])
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 60)
    width = 1.96 * values.std(ddof=1) / 60**0.5
    assert [found.low, found.high] == pytest.approx([values.mean() - width, values.mean() + width], abs=0.01)
    assert np.isnan(mean([np.nan]).mean) and mean([]).n == 0
