"""Lifetimes of models under sequences of edits: by hand, with NaN and with sequences that end before the model does."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.survival import lifetimes, log_rank, median_interval, median_lifetime, surviving


def rows_of(perplexities, group="hard", seed=0, every=2):
    return pd.DataFrame(
        {
            "n_edits": [every * place for place in range(len(perplexities))],
            "perplexity": perplexities,
            "checkpoint": True,
            "group": group,
            "seed": seed,
        }
    )


def test_a_life_ends_at_the_first_collapse_and_is_censored_without_one():
    rows = pd.concat(
        [
            rows_of([4, 5, 41, 5], seed=0),
            rows_of([4, 5, 6, 7], seed=1),
            rows_of([4, np.nan, 6, 7], seed=2),
            rows_of([4, 5, 6, np.inf], seed=3).iloc[::-1],
            rows_of([4, 5, 39.9, 40], group="normal", seed=0),
        ]
    )
    between = rows.iloc[[2]].assign(n_edits=1, perplexity=1e9, checkpoint=False)
    lives = lifetimes(pd.concat([rows, between])).set_index(["group", "seed"])
    assert lives["n_edits"].tolist() == [4, 6, 2, 6, 6]
    assert lives["collapsed"].tolist() == [True, False, True, True, True]
    assert lifetimes(rows, ratio=1.2)["n_edits"].tolist() == [2, 2, 2, 2, 2]


def test_the_share_that_stands_is_the_product_over_collapses():
    lives = pd.DataFrame({"n_edits": [2, 4, 4, 6, 6, 8], "collapsed": [True, True, False, True, False, False]})
    curve = surviving(lives).set_index("n_edits")["share"]
    expected = {0: 1, 2: 5 / 6, 4: 5 / 6 * 4 / 5, 6: 5 / 6 * 4 / 5 * 2 / 3}
    for n_edits, share in expected.items():
        assert curve[n_edits] == pytest.approx(share)
    assert curve[8] == curve[6]
    table = surviving(lives).set_index("n_edits")
    assert table.loc[6, "low"] < table.loc[6, "share"] < table.loc[6, "high"]


def test_the_median_is_infinite_where_most_stand():
    assert median_lifetime(pd.DataFrame({"n_edits": [2, 8, 8], "collapsed": [True, False, False]})) == np.inf
    assert median_lifetime(pd.DataFrame({"n_edits": [2, 4, 8], "collapsed": [True, True, False]})) == 4
    assert median_lifetime(pd.DataFrame({"n_edits": [2, 6], "collapsed": [True, True]})) == 2


def test_the_interval_of_the_median_holds_the_times_at_which_a_half_may_stand():
    lives = pd.DataFrame({"n_edits": np.arange(1, 31), "collapsed": True})
    low, high = median_interval(lives)
    # by hand, from Greenwood's variance of log(-log S): S = 1 - n/30 without censoring
    n = np.arange(1, 30)
    share, width = 1 - n / 30, 1.96 * np.sqrt(n / (30 * (30 - n))) / np.abs(np.log(1 - n / 30))
    edges = [np.exp(np.log(share) * np.exp(sign * width)) for sign in (1, -1)]
    assert (low, high) == tuple(n[edge <= 0.5][0] for edge in edges) and low < median_lifetime(lives) < high
    few = pd.DataFrame({"n_edits": [2, 4, 6], "collapsed": [True, True, False]})
    assert median_interval(few)[1] == np.inf
    standing = pd.DataFrame({"n_edits": [6, 6], "collapsed": [False, False]})
    assert median_interval(standing) == (np.inf, np.inf)


def test_the_log_rank_statistic_is_that_of_its_definition():
    """(observed - expected collapses of the first group) / √variance, summed over the times of collapse."""
    hard = pd.DataFrame({"n_edits": [2, 2, 4, 6], "collapsed": [True, True, True, False]})
    normal = pd.DataFrame({"n_edits": [4, 8, 8, 8], "collapsed": [True, True, False, False]})
    both = pd.concat([hard.assign(first=True), normal.assign(first=False)])
    difference = variance = 0.0
    for time in sorted(set(both.loc[both["collapsed"], "n_edits"])):
        at_risk, falls = both[both["n_edits"] >= time], both[(both["n_edits"] == time) & both["collapsed"]]
        n, n_first, d = len(at_risk), at_risk["first"].sum(), len(falls)
        difference += falls["first"].sum() - d * n_first / n
        if n > 1:
            variance += d * n_first / n * (1 - n_first / n) * (n - d) / (n - 1)
    found = log_rank(hard, normal)
    assert abs(found.statistic) == pytest.approx(abs(difference) / np.sqrt(variance))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.statistic)))
    assert np.isnan(log_rank(hard.assign(collapsed=False), normal.assign(collapsed=False)).p)


def test_bad_rows_are_named():
    with pytest.raises(ResultsError, match="no perplexity at 0 edits"):
        lifetimes(rows_of([4, 5]).iloc[1:])
    with pytest.raises(ResultsError, match="no sequences"):
        surviving(pd.DataFrame({"n_edits": [], "collapsed": []}))
