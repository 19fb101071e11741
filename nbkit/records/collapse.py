"""Which edits broke the model: the verdict on rows of edits, and how often it falls, with its uncertainty.

Perplexity alone decides, against a threshold that the caller states: no paper's code has one. A perplexity that is NaN
is the worst outcome there is, as an infinite one: pandas leaves it out of every median, maximum and order, so tables
take perplexities by `counted` and rises by `ratios`. Needs no torch.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_curve


def counted(perplexity: pd.Series) -> pd.Series:
    """Perplexities for tables and orders: NaN is infinite, the worst."""
    return perplexity.fillna(np.inf)


def ratios(frame: pd.DataFrame) -> pd.Series:
    """How many times each row's perplexity is its perplexity_before; infinite where it is infinite or NaN."""
    return (counted(frame["perplexity"]) / frame["perplexity_before"]).rename("ratio")


def outcomes(frame: pd.DataFrame, ratio: float = 10.0) -> pd.Series:
    """"collapse" or "normal" for each row with the columns perplexity and perplexity_before.

    An edit collapses the model when it raises perplexity `ratio` times or more; infinite and NaN perplexities do.
    """
    broken = ~(frame["perplexity"] < ratio * frame["perplexity_before"])
    return pd.Series(np.where(broken, "collapse", "normal"), index=frame.index, name="outcome")


def shares(frame: pd.DataFrame, ratio: float = 10.0, by: str | list[str] = "subject_kind") -> pd.DataFrame:
    """How many edits of each group collapse: `by`, n, collapsed, share, and Wilson's 95 % interval as low and high.

    by: the column that names the group, or several. Groups come in the order of their first row.
    """
    by, rows = [by] if isinstance(by, str) else by, []
    for names, group in outcomes(frame, ratio).groupby([frame[column] for column in by], sort=False):
        hits, n = int((group == "collapse").sum()), len(group)
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
        row = {"n": n, "collapsed": hits, "share": hits / n, "low": interval.low, "high": interval.high}
        rows.append(dict(zip(by, names, strict=True)) | row)
    return pd.DataFrame(rows)


class Detection(NamedTuple):
    """How well a score tells collapses from normal edits: the area under its ROC curve, and what that is of."""

    auc: float  # probability that a collapse has a higher score than a normal edit; NaN if either has not been seen
    low: float  # 95 % bootstrap interval
    high: float
    collapsed: int
    n: int
    curve: pd.DataFrame  # false_alarms, found (both shares), threshold


def detection(
    frame: pd.DataFrame, score: str, ratio: float = 10.0, seed: int = 0, n_resamples: int = 2000
) -> Detection:
    """The ROC curve of the column `score`, known before the edit, against the collapse measured after it.

    A higher score means more danger; an infinite one is the highest, a NaN one the lowest. The interval resamples
    collapses and normal edits each among themselves.
    """
    broken = (outcomes(frame, ratio) == "collapse").to_numpy()
    ranks = stats.rankdata(frame[score].fillna(-np.inf))
    collapsed, n = int(broken.sum()), len(broken)
    if collapsed in (0, n):
        empty = pd.DataFrame({"false_alarms": [], "found": [], "threshold": []})
        return Detection(np.nan, np.nan, np.nan, collapsed, n, empty)
    false_alarms, hits, thresholds = roc_curve(broken, ranks)
    values = dict(zip(ranks, frame[score], strict=True))
    curve = pd.DataFrame(
        {"false_alarms": false_alarms, "found": hits, "threshold": [values.get(t, np.inf) for t in thresholds]}
    )
    groups = [ranks[broken], ranks[~broken]]
    low, high = stats.bootstrap(
        [np.resize(group, max(len(group), 2)) for group in groups],  # scipy refuses one value; twice it is as good
        _area,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Detection(float(_area(*groups)), float(low), float(high), collapsed, n, curve)


def _area(collapses: np.ndarray, normals: np.ndarray, axis: int = -1) -> np.ndarray:
    """The area under the ROC curve: of the pairs of a collapse and a normal edit, the share in the right order."""
    pairs = collapses.shape[axis] * normals.shape[axis]
    return stats.mannwhitneyu(collapses, normals, axis=axis, method="asymptotic").statistic / pairs
