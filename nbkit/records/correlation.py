"""Does perplexity stand in for the task scores? Spearman's rho of score against log perplexity, with an interval.

The papers' statistic is unknown; this is the project's own. Rho depends on ranks only, so the logarithm changes nothing
and a model whose perplexity is infinite or NaN is simply the worst one. Needs no torch.
"""

import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Correlation(NamedTuple):
    """Spearman's rho of n pairs and its 95 % bootstrap interval; NaN where it is not defined."""

    rho: float
    low: float
    high: float
    n: int


def _rho(perplexity: np.ndarray, score: np.ndarray, axis: int = -1) -> np.ndarray:
    """Along an axis; `stats.spearmanr` would take the rows of a matrix for variables and correlate all with all."""
    ranks = stats.rankdata(perplexity, axis=axis), stats.rankdata(score, axis=axis)
    return stats.pearsonr(*ranks, axis=axis).statistic


def spearman(perplexity, score, seed: int = 0, n_resamples: int = 2000) -> Correlation:
    """Spearman's rho with the percentile interval of a paired bootstrap over the models.

    Args:
        perplexity: one value a model; NaN counts as infinite, the worst.
        score: one task score a model; pairs without a score are left out, and n says how many remain.
        seed: of the resampling; the same seed gives the same interval.
    """
    perplexity, score = np.asarray(perplexity, float), np.asarray(score, float)
    perplexity, score = perplexity[~np.isnan(score)], score[~np.isnan(score)]
    perplexity = np.where(np.isnan(perplexity), np.inf, perplexity)
    n = len(score)
    if n < 3 or np.ptp(score) == 0 or (perplexity == perplexity[0]).all():
        return Correlation(np.nan, np.nan, np.nan, n)
    with warnings.catch_warnings():  # a resample of equal values has no rho: NaN, left out of the interval below
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        resampled = stats.bootstrap(
            (stats.rankdata(perplexity), score),
            _rho,
            paired=True,
            n_resamples=n_resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    low, high = np.nanquantile(resampled.bootstrap_distribution, [0.025, 0.975])
    return Correlation(float(stats.spearmanr(perplexity, score).statistic), float(low), float(high), n)


def correlations(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row a task: rho, low, high, n, over the edited models; rows of `studies.treated_scores` with perplexity."""
    edited = frame[frame["edited"]] if "edited" in frame else frame
    rows = [
        {"task": task, **spearman(rows["perplexity"], rows["score"], seed=seed)._asdict()}
        for task, rows in edited.groupby("task", sort=False)
    ]
    return pd.DataFrame(rows, columns=["task", "rho", "low", "high", "n"])


def compared(perplexities: pd.DataFrame, score, seed: int = 0, n_resamples: int = 2000) -> pd.DataFrame:
    """Several perplexities of the same models, one a column, held to their scores and to the first column.

    One row a column: rho, low, high (Spearman's with the score), agreement with its bounds (Spearman's with the first
    column), difference with its bounds (rho less the first column's; below zero: this one goes closer), and n. All
    intervals are of 95 %, of one bootstrap over the models. NaN perplexities count as infinite; models without a score
    are left out.
    """
    score = np.asarray(score, float)
    values = perplexities.to_numpy(float)[~np.isnan(score)]
    values, score = np.where(np.isnan(values), np.inf, values).T, score[~np.isnan(score)]
    drawn = np.random.default_rng(seed).integers(len(score), size=(n_resamples, len(score)))
    rows = []
    with warnings.catch_warnings():  # a resample of equal values has no rho: NaN, left out of the intervals
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        first = _rho(values[0], score), _rho(values[0][drawn], score[drawn])
        for name, value in zip(perplexities, values, strict=True):
            rho = _rho(value, score), _rho(value[drawn], score[drawn])
            agreement = _rho(value, values[0]), _rho(value[drawn], values[0][drawn])
            found = {"rho": rho, "agreement": agreement, "difference": (rho[0] - first[0], rho[1] - first[1])}
            rows.append({"text": name})
            for what, (whole, resampled) in found.items():
                low, high = np.nanquantile(resampled, [0.025, 0.975]) if len(score) > 2 else (np.nan, np.nan)
                names = ("low", "high") if what == "rho" else (f"{what}_low", f"{what}_high")
                rows[-1] |= {what: float(whole), names[0]: float(low), names[1]: float(high)}
            rows[-1]["n"] = len(score)
    return pd.DataFrame(rows)
