"""A threshold on one half of the models, tried on the other: how many of the lost it finds, and how many false alarms.

    splits = halves(models["ratio"], models["worst"] < 0.5, seed=0)     # one row a random split
    over_splits(splits)                                                # median and range

A threshold that is chosen and tried on the same models is better than it will be on others. Needs no torch.
"""

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve
from sklearn.model_selection import StratifiedShuffleSplit

from nbkit.records.intervals import mean

COLUMNS = ["threshold", "found", "found_low", "found_high", "lost",
           "false_alarms", "false_alarms_low", "false_alarms_high", "kept"]  # fmt: skip


def best_threshold(ratio, lost) -> float:
    """The threshold t for which "ratio >= t" has the largest share of the lost less that of the kept (Youden's J).

    It lies half way, in logarithms, to the next smaller ratio. NaN if all are lost, or none is.
    """
    ratio, lost = np.asarray(ratio, float), np.asarray(lost, bool)
    if lost.all() or not lost.any():
        return float("nan")
    values, ranks = np.unique(np.where(np.isnan(ratio), np.inf, ratio), return_inverse=True)
    false_alarms, found, places = roc_curve(lost, ranks, drop_intermediate=False)
    if (found - false_alarms).argmax() == 0:  # no threshold is better than to raise no alarm
        return float("inf")
    place = int(places[(found - false_alarms).argmax()])
    low, high = values[max(place - 1, 0)], values[place]
    return float(np.sqrt(low * high)) if np.isfinite(high) and low > 0 else float(high)


def halves(ratio, lost, seed: int = 0, n_splits: int = 200) -> pd.DataFrame:
    """One row a random split: the threshold of one half, and on the other half the shares found and of false alarms.

    Both halves have their share of the lost. The intervals of a row are Wilson's of 95 %, over the models of its other
    half; lost and kept say how many there are of each. Empty with fewer than two of either.
    """
    ratio, lost = np.asarray(ratio, float), np.asarray(lost, bool)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    if min(lost.sum(), (~lost).sum()) < 2:
        return pd.DataFrame(columns=COLUMNS)
    rows = []
    for chosen, tried in StratifiedShuffleSplit(n_splits, test_size=0.5, random_state=seed).split(ratio, lost):
        threshold = best_threshold(ratio[chosen], lost[chosen])
        alarms, of_lost = ratio[tried] >= threshold, lost[tried]
        rows.append([threshold, *mean(alarms[of_lost]), *mean(alarms[~of_lost])])
    return pd.DataFrame(rows, columns=COLUMNS)


def over_splits(splits: pd.DataFrame) -> pd.DataFrame:
    """The median over the splits, and the range of the middle 95 % of them, of threshold, found and false_alarms."""
    names = ["threshold", "found", "false_alarms"]
    middle = {"median": 0.5, "low": 0.025, "high": 0.975}
    quantiles = {name: splits[names].astype(float).quantile(q, interpolation="lower") for name, q in middle.items()}
    return pd.DataFrame(quantiles).assign(n_splits=len(splits))
