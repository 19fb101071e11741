"""Which edits broke the model: the verdict on rows of edits, and how often it falls, with its uncertainty.

Perplexity alone decides, against a threshold that the caller states: no paper's code has one. Needs no torch.
"""

import numpy as np
import pandas as pd
from scipy import stats


def outcomes(frame: pd.DataFrame, ratio: float = 10.0) -> pd.Series:
    """"collapse" or "normal" for each row with the columns perplexity and perplexity_before.

    An edit collapses the model when it raises perplexity `ratio` times or more; infinite and NaN perplexities do.
    """
    broken = ~(frame["perplexity"] < ratio * frame["perplexity_before"])
    return pd.Series(np.where(broken, "collapse", "normal"), index=frame.index, name="outcome")


def shares(frame: pd.DataFrame, ratio: float = 10.0, by: str = "subject_kind") -> pd.DataFrame:
    """How many edits of each group collapse: `by`, n, collapsed, share, and Wilson's 95 % interval as low and high.

    Groups come in the order of their first row.
    """
    rows = []
    for name, group in outcomes(frame, ratio).groupby(frame[by], sort=False):
        hits, n = int((group == "collapse").sum()), len(group)
        interval = stats.binomtest(hits, n).proportion_ci(method="wilson")
        row = {by: name, "n": n, "collapsed": hits, "share": hits / n, "low": interval.low, "high": interval.high}
        rows.append(row)
    return pd.DataFrame(rows)
