"""Which requests are worth editing to find those that collapse a model, and what a search by risk has missed.

    chosen = choose(risk["risk"], n_worst=15, n_random=15, seed=0)     # "worst", "random" or None for each request
    table = found(rows.assign(chosen=...), n_requests=len(risk))       # of the edits that were made

The worst are edited because a score says that they are dangerous; what the score misses is seen by editing others that
were drawn at random from the rest. Needs no torch.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.bounds import check_number
from nbkit.records.collapse import shares

WORST, RANDOM = "worst", "random"
COLUMNS = ["chosen", "n", "of", "collapsed", "share", "low", "high", "collapses", "collapses_low", "collapses_high"]


class Hidden(NamedTuple):
    """How many of a finite group have a property, from a sample of it: the estimate, and a 95 % interval of counts."""

    estimate: float
    low: int
    high: int


def choose(score: pd.Series, n_worst: int, n_random: int, seed: int = 0) -> pd.Series:
    """WORST for the `n_worst` highest scores, RANDOM for `n_random` of the others, drawn by `seed`; None for the rest.

    An infinite score is the highest, and so is NaN: what cannot be foretold is not to be trusted. Of equal scores the
    first are taken. With fewer requests than asked for all are chosen.
    """
    for name, number in (("n_worst", n_worst), ("n_random", n_random), ("seed", seed)):
        check_number(name, number, whole=True, error=ResultsError, least=0)
    order = np.argsort(-score.fillna(np.inf).to_numpy(float), kind="stable")
    worst, rest = order[:n_worst], order[n_worst:]
    drawn = np.random.default_rng(seed).permutation(rest)[:n_random]
    chosen = np.full(len(score), None, object)
    chosen[worst], chosen[drawn] = WORST, RANDOM
    return pd.Series(chosen, index=score.index, name="chosen")


def hidden(hits: int, n: int, size: int) -> Hidden:
    """How many of `size` have what `hits` of `n` drawn from them without replacement have.

    The interval holds the counts with which as few hits as these, and as many, come with a probability of 2.5 % or more
    each (Clopper and Pearson's, for draws without replacement), so it is never too short: with none of 15 it does not
    end at 0. Of all that there are, it is the count.
    """
    if not 0 <= hits <= n <= size or not n:
        raise ResultsError(f"{hits} of {n} cannot have been drawn from {size}")
    counts = np.arange(hits, size - (n - hits) + 1)
    likely = (stats.hypergeom.sf(hits - 1, size, counts, n) >= 0.025) & (
        stats.hypergeom.cdf(hits, size, counts, n) >= 0.025
    )
    return Hidden(size * hits / n, int(counts[likely].min()), int(counts[likely].max()))


def found(rows: pd.DataFrame, n_requests: int, ratio: float = 10.0) -> pd.DataFrame:
    """What the screening of `n_requests` found: one row for the worst, one for the others, where any were edited.

    rows: of `studies.single_edits` of the chosen ones: chosen, perplexity, perplexity_before. `ratio` of a collapse.

    Columns: chosen, n (edited), of (so many there are), collapsed, share with its Wilson interval as low and high (the
    worst: the precision, over requests; the others: how often the screening misses one), and in all `of` of them
    collapses, from collapses_low to collapses_high (`hidden`; the worst were all edited, so theirs is a count).
    """
    n_worst = int((rows["chosen"] == WORST).sum())
    table = shares(rows, ratio, by="chosen")
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    table.insert(2, "of", [n_worst if chosen == WORST else n_requests - n_worst for chosen in table["chosen"]])
    hid = [hidden(row.collapsed, row.n, row.of) for row in table.itertuples()]
    return table.assign(
        collapses=[each.estimate for each in hid],
        collapses_low=[each.low for each in hid],
        collapses_high=[each.high for each in hid],
    )


class Recall(NamedTuple):
    """How many of all collapsing requests the screening found, from the strata of `found`."""

    found: int
    share: float  # found / (found + estimated among the others); NaN where there are none
    low: float
    high: float
    total: float  # collapsing requests in all, estimated
    total_low: int
    total_high: int


def recall(table: pd.DataFrame) -> Recall:
    """Of the table of `found`; ResultsError without edits drawn at random, for then nothing is known of the others."""
    by = table.set_index("chosen")
    if RANDOM not in by.index:
        raise ResultsError("no edit was drawn at random, so nothing is known of what the screening misses")
    hits = int(by.loc[WORST, "collapsed"]) if WORST in by.index else 0
    estimate, low, high = (float(by.loc[RANDOM, name]) for name in ("collapses", "collapses_low", "collapses_high"))

    def share(missed: float) -> float:
        return hits / (hits + missed) if hits + missed else float("nan")

    return Recall(hits, share(estimate), share(high), share(low), hits + estimate, hits + int(low), hits + int(high))
