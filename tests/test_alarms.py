"""Alarms at a threshold that is fixed on other requests, and areas for another mix of kinds."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from nbkit.errors import ResultsError
from nbkit.records.alarms import alarms, threshold, weighted_area, weights
from nbkit.records.collapse import detection

FRAME = pd.DataFrame(
    {"risk": [1.0, 2.0, 3.0, 4.0, 5.0, np.nan], "perplexity": [1.0, 1, 50, 1, np.nan, 1], "perplexity_before": 1.0}
)


def test_the_threshold_has_most_found_for_least_false_alarms():
    assert 2 < threshold(FRAME, "risk") <= 3  # both collapses for one of four others; 5 has one for none
    assert np.isnan(threshold(FRAME[:2], "risk"))


def test_alarms_are_counted_with_wilson_s_intervals():
    row = alarms(FRAME, "risk", 4.0)
    assert (row["found"], row["collapsed"], row["false_alarms"], row["normal"]) == (1, 2, 1, 4)
    expected = stats.binomtest(1, 4).proportion_ci(method="wilson")
    assert (row["false_alarms_low"], row["false_alarms_high"]) == pytest.approx((expected.low, expected.high))
    nothing = alarms(FRAME[:2], "risk", np.nan)
    assert nothing["false_alarms"] == 0 and np.isnan(nothing["found_share"]) and np.isnan(nothing["found_low"])


def test_weights_give_the_kinds_the_shares_of_the_population():
    kinds = pd.Series(["a", "a", "b"])
    counted = weights(kinds, pd.Series(["a"] * 1 + ["b"] * 9))
    assert counted.tolist() == pytest.approx([0.15, 0.15, 2.7]) and counted.sum() == pytest.approx(3)
    assert weights(kinds, pd.Series(["a", "b", "c", "c"])).tolist() == pytest.approx([0.75, 0.75, 1.5])
    with pytest.raises(ResultsError, match="no request of the kind b, and"):
        weights(kinds, pd.Series(["a"]))


def test_the_weighted_area_is_scikit_learn_s_and_without_weights_that_of_detection():
    random = np.random.default_rng(0)
    score = random.normal(size=90).round(1)  # with ties
    broken = score + random.normal(size=90) > 0.8
    frame = pd.DataFrame({"risk": score, "perplexity": np.where(broken, 100.0, 1.0), "perplexity_before": 1.0})
    heavy = pd.Series(random.uniform(0.1, 3, size=90))
    found = weighted_area(frame, "risk", heavy)
    assert found.auc == pytest.approx(roc_auc_score(broken, score, sample_weight=heavy))
    assert found.low < found.auc < found.high
    plain, known = weighted_area(frame, "risk", pd.Series(np.ones(90))), detection(frame, "risk")
    assert plain.auc == pytest.approx(known.auc)
    assert [plain.low, plain.high] == pytest.approx([known.low, known.high], abs=0.02)
    assert np.isnan(weighted_area(frame[~broken], "risk", heavy[~broken]).auc)
