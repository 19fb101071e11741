"""What settings of an edit do, setting by setting: shares and means over requests with their intervals. No torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from nbkit.records.collapse import outcomes

COLLAPSED = "collapsed"


def wilson(mean: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a mean of n values between 0 and 1; for a share of n, scipy's.

    Of values that are not only 0 and 1 (each a mean over prefixes, say) it is too wide rather than too narrow, since
    none in [0, 1] vary more than those. NaN for n = 0.
    """
    if not n:
        return np.nan, np.nan
    z = stats.norm.ppf((1 + level) / 2)
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return float(max(middle - reach, 0.0)), float(min(middle + reach, 1.0))


def effects(frame: pd.DataFrame, by: Sequence[str], scores: Mapping[str, str], ratio: float = 10.0) -> pd.DataFrame:
    """Of each group of edits the share that collapses, and the mean of each score, with 95 % intervals (`wilson`).

    Args:
        frame: rows of edits: perplexity, perplexity_before, the columns `by`, and those of the scores, in [0, 1].
        scores: {column: what it is called}. NaN, where a request has nothing to measure a score by, does not count.
        ratio: as in `collapse.outcomes`; None leaves collapses out.

    Columns: those `by`, measure ("collapsed" or a score's name), n (requests), value, low, high; groups in the order of
    their first row.
    """
    shown = {**({} if ratio is None else {COLLAPSED: COLLAPSED}), **scores}
    if ratio is not None:
        frame = frame.assign(**{COLLAPSED: (outcomes(frame, ratio) == "collapse").astype(float)})
    rows = []
    for names, group in frame.groupby(list(by), sort=False):
        for column, called in shown.items():
            values = group[column].dropna().astype(float)
            mean = values.mean() if len(values) else np.nan
            low, high = wilson(mean, len(values))
            about = dict(zip(by, names, strict=True))
            rows.append({**about, "measure": called, "n": len(values), "value": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def in_words(row: Mapping) -> str:
    """ "88 % [53, 98] of 8": a row of `effects`."""
    if not row["n"]:
        return "none"
    return f"{100 * row['value']:.0f} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}] of {int(row['n'])}"
