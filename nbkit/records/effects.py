"""What settings of an edit do, setting by setting: shares and means over requests with their intervals. No torch."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from nbkit.records.collapse import outcomes
from nbkit.records.intervals import wilson

COLLAPSED = "collapsed"


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
