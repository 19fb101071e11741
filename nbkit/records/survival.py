"""How many edits a model survives: sequences as lifetimes, censored where they end before the model does. No torch.

    lives = lifetimes(rows, ratio=10)             # one row a sequence
    curve = surviving(lives)                      # the share still standing after so many edits, with its interval
    median_lifetime(lives)                        # inf if more than half are standing at the end
    median_interval(lives)                        # of that, over sequences
    log_rank(lives[hard], lives[normal])          # is the difference more than chance?

A collapse is seen at the first measurement behind it, so with one every so many edits a lifetime is the upper end of
that span. Whoever measures more rarely lets models live longer: compare what was measured alike.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.collapse import outcomes


def lifetimes(rows: pd.DataFrame, ratio: float = 10.0, by: Sequence[str] = ("group", "seed")) -> pd.DataFrame:
    """One row a sequence: `by`, n_edits and collapsed.

    rows: of `studies.sequential_edits`, with a row at 0 edits in each sequence: n_edits, perplexity, checkpoint, `by`.
    n_edits is that of the first checkpoint with perplexity `ratio` times the one at 0 edits or more, infinite or NaN
    among it; without one, that of the last checkpoint, and collapsed is False: the sequence is censored there.
    ResultsError for a sequence without a checkpoint at 0 edits.
    """
    found = []
    measured = rows[rows["checkpoint"].astype(bool)].sort_values("n_edits", kind="stable")
    for names, sequence in measured.groupby(list(by), sort=False):
        if sequence["n_edits"].iloc[0] != 0:
            raise ResultsError(f"the sequence {names} has no perplexity at 0 edits to compare with")
        before = sequence["perplexity"].iloc[0]
        broken = outcomes(sequence.assign(perplexity_before=before), ratio) == "collapse"
        ends = sequence.loc[broken, "n_edits"] if broken.any() else sequence["n_edits"].iloc[-1:]
        found.append([*names, int(ends.iloc[0]), bool(broken.any())])
    return pd.DataFrame(found, columns=[*by, "n_edits", "collapsed"])


def surviving(lives: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """The share of sequences still standing after n_edits (Kaplan and Meier's estimate): n_edits, share, low, high.

    The first row is that of 0 edits. low and high: the interval over sequences by the exponential Greenwood formula,
    NaN where all or none stand.
    """
    kept = stats.ecdf(_censored(lives)).sf
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.filterwarnings("ignore", "The confidence interval is undefined")  # NaN there, as said above
        interval = kept.confidence_interval(confidence_level=level, method="log-log")
    return pd.DataFrame(
        {
            "n_edits": [0, *kept.quantiles],
            "share": [1.0, *kept.probabilities],
            "low": [np.nan, *interval.low.probabilities],
            "high": [np.nan, *interval.high.probabilities],
        }
    )


def median_lifetime(lives: pd.DataFrame) -> float:
    """The fewest edits after which half of the sequences or fewer are standing; inf if more are, to the end."""
    curve = surviving(lives)
    fallen = curve.loc[curve["share"] <= 0.5, "n_edits"]
    return float(fallen.iloc[0]) if len(fallen) else np.inf


def median_interval(lives: pd.DataFrame, level: float = 0.95) -> tuple[float, float]:
    """The interval of `median_lifetime` over sequences, after Brookmeyer and Crowley: the numbers of edits at which the
    interval of `surviving` holds a half. Its upper end is inf where that never lies below a half, as of few sequences.
    """
    curve = surviving(lives, level)
    lows, highs = (curve.loc[curve[edge] <= 0.5, "n_edits"] for edge in ("low", "high"))
    ends = median_lifetime(lives) if lows.empty else float(lows.iloc[0])
    return ends, float(highs.iloc[0]) if len(highs) else np.inf


class LogRank(NamedTuple):
    """Of the hypothesis that two groups of sequences live alike: the statistic, standard normal under it, and its p."""

    statistic: float
    p: float


def log_rank(lives: pd.DataFrame, others: pd.DataFrame) -> LogRank:
    """Whether two groups' lifetimes differ by more than chance (two-sided, asymptotic; NaN where none collapsed)."""
    if not (lives["collapsed"].any() or others["collapsed"].any()):
        return LogRank(np.nan, np.nan)
    found = stats.logrank(_censored(lives), _censored(others))
    return LogRank(float(found.statistic), float(found.pvalue))


def _censored(lives: pd.DataFrame) -> stats.CensoredData:
    if lives.empty:
        raise ResultsError("there are no sequences whose lifetimes could be compared")
    return stats.CensoredData.right_censored(lives["n_edits"].to_numpy(float), ~lives["collapsed"].to_numpy(bool))
