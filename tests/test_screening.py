"""A search by risk finds the worst, and what it misses is estimated from others that were drawn, never assumed."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.screening import choose, found, hidden, recall


def test_the_worst_are_the_highest_and_the_others_are_drawn_from_the_rest():
    score = pd.Series([1.0, np.nan, 3.0, np.inf, 2.0, 5.0, 0.1, 0.2], index=list("abcdefgh"))
    chosen = choose(score, 3, 2, seed=0)
    assert chosen[chosen == "worst"].index.tolist() == ["b", "d", "f"]
    assert (chosen == "random").sum() == 2 and chosen.isna().sum() == 3
    assert choose(score, 3, 2, seed=0).equals(chosen)
    assert len({tuple(choose(score, 3, 2, seed=seed).isna()) for seed in range(9)}) > 1
    assert choose(score, 0, 0).isna().all() and choose(score, 5, 99).notna().all()
    with pytest.raises(ResultsError, match="n_worst must be a whole number from 0 on"):
        choose(score, -1, 2)


@pytest.mark.parametrize(("hits", "n", "size"), [(0, 15, 135), (3, 15, 135), (15, 15, 40), (2, 7, 9)])
def test_the_interval_holds_the_counts_that_are_not_too_unlikely(hits, n, size):
    def at_most(count, draws):  # by hand: of all draws of n from size, of which `count` have it
        return sum(stats.hypergeom.pmf(range(draws + 1), size, count, n))

    plain = [
        count
        for count in range(size + 1)
        if at_most(count, hits) >= 0.025 and 1 - (at_most(count, hits - 1) if hits else 0) >= 0.025
    ]
    estimate, low, high = hidden(hits, n, size)
    assert (low, high) == (plain[0], plain[-1]) and estimate == size * hits / n
    assert low <= estimate <= high


def test_the_interval_is_right_in_95_of_100_draws():
    draw, size, true = np.random.default_rng(0), 60, 9
    held = [hidden(int(draw.hypergeometric(true, size - true, 15)), 15, size) for _ in range(2000)]
    assert np.mean([one.low <= true <= one.high for one in held]) >= 0.95


def test_what_all_were_looked_at_for_is_a_count_and_nonsense_is_refused():
    assert hidden(4, 9, 9) == (4, 4, 4)
    for given in [(3, 2, 9), (0, 0, 9), (1, 9, 8)]:
        with pytest.raises(ResultsError, match="cannot have been drawn"):
            hidden(*given)


def rows(worst, random) -> pd.DataFrame:
    perplexity = [*worst, *random]
    chosen = ["worst"] * len(worst) + ["random"] * len(random)
    return pd.DataFrame({"chosen": chosen, "perplexity": perplexity, "perplexity_before": 4.0})


def test_what_a_screening_found_and_missed():
    table = found(rows([400, np.nan, 5, 90], [5, 5, 50, 5, 5]), n_requests=24)
    assert table[["chosen", "n", "of", "collapsed", "share"]].values.tolist() == [
        ["worst", 4, 4, 3, 0.75], ["random", 5, 20, 1, 0.2]]  # fmt: skip
    assert table.loc[0, ["collapses_low", "collapses", "collapses_high"]].tolist() == [3, 3, 3]
    wilson = stats.binomtest(1, 5).proportion_ci(method="wilson")
    assert table.loc[1, ["low", "high"]].tolist() == pytest.approx([wilson.low, wilson.high])
    assert table.loc[1, "collapses"] == 4 and table.loc[1, "collapses_high"] > 4
    seen = recall(table)
    assert seen.found == 3 and seen.share == 3 / 7 and seen.total == 7 and seen.low < 3 / 7 < seen.high
    none = recall(found(rows([400], [5] * 5), n_requests=24))
    assert none.share == 1 and none.low < 0.2 and none.total_high > 10
    with pytest.raises(ResultsError, match="drawn at random"):
        recall(found(rows([400], []), n_requests=24))
    nothing = found(rows([], []), n_requests=24)
    assert nothing.empty and list(nothing) == list(table)
