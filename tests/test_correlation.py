"""Spearman's rho and its bootstrap interval, against scipy's own and against a known truth."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbkit.records import correlation


def test_interval_holds_the_truth_about_as_often_as_it_says():
    random, hits = np.random.default_rng(1), 0
    true_rho = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of a normal pair with correlation 0.6
    for seed in range(60):
        x, y = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=60).T
        found = correlation.spearman(np.exp(x), y, seed=seed, n_resamples=300)
        hits += found.low <= true_rho <= found.high
    assert 50 <= hits <= 60


def test_every_resample_has_spearmans_rho_of_its_own():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(20, 8)), random.integers(0, 3, (20, 8)).astype(float)
    y[3] = 1.0  # nothing varies: no rho
    with pytest.warns(stats.ConstantInputWarning):
        found = correlation._rho(x, y)
        expected = [stats.spearmanr(*pair).statistic for pair in zip(x, y, strict=True)]
    assert np.isnan(found[3]) and np.isnan(found).sum() == 1
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_resamples_without_a_rho_are_left_out_of_the_interval():
    found = correlation.spearman([1.0, 2.0, math.nan, 3.0], [3.0, 3.0, 1.0, 3.0], seed=2)
    assert found.rho == pytest.approx(stats.spearmanr([1, 2, 4, 3], [3, 3, 1, 3]).statistic)
    assert -1 <= found.low <= found.rho <= found.high <= 1


def test_correlations_are_one_row_a_task_over_edited_models():
    one = pd.DataFrame({"perplexity": [9.0, 1, 2, 3, 4], "score": [0.0, 4, 3, 2, 1], "edited": [False, *[True] * 4]})
    frame = pd.concat([one.assign(task="nli"), one.assign(task="ner", score=one["score"] ** 2)])
    table = correlation.correlations(frame)
    assert table["task"].tolist() == ["nli", "ner"] and table["n"].tolist() == [4, 4]
    np.testing.assert_allclose(table["rho"], -1)
    assert len(correlation.correlations(frame.drop(columns="edited")).query("n == 5")) == 2
