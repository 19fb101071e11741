"""What a score known before an edit is good for: alarms at a threshold fixed beforehand, and another mix of requests.

    tuning = rows["case_id"].astype(int) % 2 == 0
    at = alarms.threshold(rows[tuning], "small")
    alarms.alarms(rows[~tuning], "small", at)                # found, and false alarms, on requests it was not fixed on
    weights = alarms.weights(rows["subject_kind"], kinds_of_all)
    alarms.weighted_area(rows, "small", weights)             # of a plain random sample of all

Requests that are sampled by kind, a third of each, hold more of a rare kind than the facts that they are drawn from;
there an area or a share says nothing about a plain random request unless every row counts by its kind's share.
Needs no torch.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.collapse import outcomes
from nbkit.records.intervals import mean
from nbkit.records.thresholds import best_threshold


class Area(NamedTuple):
    """An area under a ROC curve and its 95 % bootstrap interval; NaN if a collapse or a normal edit is missing."""

    auc: float
    low: float
    high: float


def threshold(frame: pd.DataFrame, score: str, ratio: float = 10.0) -> float:
    """From which score on an alarm is given: `thresholds.best_threshold` of these rows. NaN, at which no alarm is ever
    given, where they hold no collapse or no normal edit."""
    return best_threshold(frame[score].fillna(-np.inf), outcomes(frame, ratio) == "collapse")


def alarms(frame: pd.DataFrame, score: str, at: float, ratio: float = 10.0) -> dict[str, float]:
    """Alarms (score `at` or higher) against what the edits did: counts, and shares with Wilson's 95 % intervals.

    collapsed and found of them; normal and false_alarms of them; found_share, found_low, found_high and the same of
    false_alarms (NaN of none). Rows whose score is NaN give no alarm.
    """
    broken, alarm = outcomes(frame, ratio) == "collapse", frame[score] >= at
    row: dict[str, float] = {"collapsed": int(broken.sum()), "normal": int((~broken).sum())}
    for name, of in (("found", broken), ("false_alarms", ~broken)):
        share = mean(alarm[of])
        row |= {name: int((alarm & of).sum()), f"{name}_share": share.mean}
        row |= {f"{name}_low": share.low, f"{name}_high": share.high}
    return row


def weights(kinds: pd.Series, population: pd.Series) -> pd.Series:
    """What each row counts for so that the kinds have the shares that they have in `population`; 1 on average.

    ResultsError for a kind of the rows that the population does not have. One of the population that the rows do not
    have is left out.
    """
    there, here = population.value_counts(normalize=True), kinds.value_counts(normalize=True)
    if missing := sorted(set(here.index) - set(there.index)):
        raise ResultsError(f"the population holds no request of the kind {', '.join(missing)}, and the rows do")
    there = there[here.index] / there[here.index].sum()
    return kinds.map(there / here).astype(float).rename("weight")


def weighted_area(
    frame: pd.DataFrame, score: str, weights: pd.Series, ratio: float = 10.0, seed: int = 0, n_resamples: int = 2000
) -> Area:
    """The area under the ROC curve of `score` where each row counts by its weight, as in `collapse.detection`.

    The interval resamples collapses and normal edits each among themselves, their weights with them.
    """
    broken = (outcomes(frame, ratio) == "collapse").to_numpy()
    values, heavy = frame[score].fillna(-np.inf).to_numpy(float), weights.to_numpy(float)
    if not broken.any() or broken.all():
        return Area(np.nan, np.nan, np.nan)
    order = np.sign(stats.rankdata(values)[broken][:, None] - stats.rankdata(values)[~broken])
    right = (order + 1) / 2  # (collapse, normal): 1 where the collapse's score is higher, 1/2 where both are equal
    parts = heavy[broken], heavy[~broken]

    def area(of_broken: np.ndarray, of_normal: np.ndarray) -> np.ndarray:
        return np.einsum("bc,cn,bn->b", of_broken, right, of_normal) / (of_broken.sum(1) * of_normal.sum(1))

    rng = np.random.default_rng(seed)
    drawn = [part * rng.multinomial(len(part), np.full(len(part), 1 / len(part)), n_resamples) for part in parts]
    low, high = np.quantile(area(*drawn), [0.025, 0.975])
    return Area(float(area(*(part[None] for part in parts))[0]), float(low), float(high))
