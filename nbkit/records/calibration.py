"""What perplexity became, held to what had been foretold from the update: rows with both, from `nbkit.damage`.

    found = calibration(frame)                   # columns perplexity, perplexity_before, felt_relative, update_norm
    found.line, found.detections, threshold(frame, ratio=1.5)

Needs no torch.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nbkit.errors import ResultsError
from nbkit.records.bounds import check_number
from nbkit.records.collapse import Detection, detection, outcomes, ratios


class Line(NamedTuple):
    """log(perplexity ratio) = slope · log(score) + intercept by least squares, natural logarithms, and the 95 %
    percentile intervals of a bootstrap over the edits; NaN where fewer than three different scores are left."""

    slope: float
    slope_low: float
    slope_high: float
    intercept: float
    intercept_low: float
    intercept_high: float
    n: int  # edits that the line is of
    left_out: int  # without a finite ratio, or a score that is finite and above 0


class Calibration(NamedTuple):
    """line: of the first score. detections: by score, how well it tells the collapses from the other edits."""

    line: Line
    detections: dict[str, Detection]


class Threshold(NamedTuple):
    """The cut of a score that misjudges the fewest edits: those above it should be those that rise so much."""

    cut: float  # half way, in logarithms, between the two scores beside it; NaN if all edits rise, or none does
    misjudged: int
    rising: int  # edits whose perplexity is `ratio` times what it was, or more
    n: int


def calibration(
    frame: pd.DataFrame,
    scores: Sequence[str] = ("felt_relative", "update_norm"),
    ratio: float = 10.0,
    seed: int = 0,
    n_resamples: int = 2000,
) -> Calibration:
    """How the perplexity of edited models follows what was foretold of them, and how well it tells who collapses.

    One row an edit, with perplexity, perplexity_before and the columns that `scores` names, higher meaning worse; the
    rows may be of several methods, but of one model. ratio: of collapse, as in `records.collapse`. Both intervals are
    of 95 %, and the same seed gives the same.

    An infinite or NaN perplexity has no place on a line, nor has a score of 0, as that of a refused edit: these edits
    are left out of it, and `left_out` counts them. In the detections they all count: such a perplexity is a collapse,
    an infinite score the highest, and a NaN one as well, since what cannot be foretold is not to be trusted.
    ResultsError for a column that is missing.
    """
    _check(frame, scores)
    filled = frame.assign(**{score: frame[score].fillna(np.inf) for score in scores})
    found = {score: detection(filled, score, ratio, seed, n_resamples) for score in scores}
    return Calibration(line(frame, scores[0], seed, n_resamples), found)


def line(frame: pd.DataFrame, score: str = "felt_relative", seed: int = 0, n_resamples: int = 2000) -> Line:
    """The line of one score; see `calibration`."""
    _check(frame, [score])
    y, x = ratios(frame).to_numpy(float), frame[score].to_numpy(float)
    usable = np.isfinite(y) & np.isfinite(x) & (y > 0) & (x > 0)
    x, y = np.log(x[usable]), np.log(y[usable])
    n, left_out = len(x), int((~usable).sum())
    if len(np.unique(x)) < 3:
        return Line(*[np.nan] * 6, n, left_out)
    with warnings.catch_warnings():  # a resample of equal scores has no line: NaN, left out of the intervals below
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        resampled = stats.bootstrap(
            (x, y), _fit, paired=True, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(seed)
        )
    slope, intercept = _fit(x, y)
    (slope_low, intercept_low), (slope_high, intercept_high) = np.nanquantile(
        resampled.bootstrap_distribution, [0.025, 0.975], axis=-1
    )
    numbers = slope, slope_low, slope_high, intercept, intercept_low, intercept_high
    return Line(*map(float, numbers), n, left_out)


def threshold(frame: pd.DataFrame, score: str = "felt_relative", ratio: float = 1.5) -> Threshold:
    """From which score on perplexity is `ratio` times what it was before the edit, or more; NaN and infinity are.

    Of cuts that misjudge equally few the lowest. It is what was best on these edits, and on others will be less good.
    """
    _check(frame, [score])
    check_number("ratio", ratio, error=ResultsError, above=0)
    rises = (outcomes(frame, ratio) == "collapse").to_numpy()
    scores, rising, n = frame[score].fillna(np.inf).to_numpy(float), int(rises.sum()), len(frame)
    if rising in (0, n):
        return Threshold(np.nan, 0, rising, n)
    values = np.unique(scores)
    wrong = [int(((scores >= value) != rises).sum()) for value in [*values, np.inf]]
    wrong[-1] = rising  # a cut above all scores, infinite ones too
    place = int(np.argmin(wrong))
    below, above = values[max(place - 1, 0)], values[min(place, len(values) - 1)]
    between = place not in (0, len(values)) and 0 < below and np.isfinite(above)
    cut = np.sqrt(below * above) if between else (above if place < len(values) else np.inf)
    return Threshold(float(cut), wrong[place], rising, n)


def _fit(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Slope and intercept along an axis, (2, ...)."""
    x_mean, y_mean = x.mean(axis, keepdims=True), y.mean(axis, keepdims=True)
    slope = ((x - x_mean) * (y - y_mean)).sum(axis) / np.square(x - x_mean).sum(axis)
    return np.stack([slope, y.mean(axis) - slope * x.mean(axis)])


def _check(frame: pd.DataFrame, scores: Sequence[str]) -> None:
    missing = [name for name in ("perplexity", "perplexity_before", *scores) if name not in frame]
    if missing:
        raise ResultsError(f"the rows have no column {', '.join(missing)}; felt_relative comes of nbkit.damage")
