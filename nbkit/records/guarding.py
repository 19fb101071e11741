"""What a guard does with edits that were measured without one, for any threshold: no edit is made a second time.

    guarded(rome_rows, unedited, most=4)                        # instead="refuse"
    guarded(rome_rows, unedited, most=4, instead=c_rome_rows)   # instead="C-ROME"

The guard (methods/guard.py) looks at each edit by itself, so rows of `studies.single_edits` with `Guard(inf)`, which
lets all through and says what is felt of each, hold all that it would do. Needs no torch.
"""

import numpy as np
import pandas as pd

from nbkit.errors import ResultsError
from nbkit.records.bounds import check_number
from nbkit.records.collapse import counted, ratios

PASSED, FELL_BACK, REFUSED = "passed", "fell back", "refused"


def guarded(
    rows: pd.DataFrame, unedited: pd.DataFrame, most: float, instead: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The rows as `Guard(most, ...)` would have had them: perplexity, perplexity_before, guard, and the metrics.

    Args:
        rows: of single edits: felt_relative, perplexity, perplexity_before and the columns of `unedited`.
        unedited: the edit metrics of the unedited model, of the same requests in the same order: what a refused edit
            has.
        instead: rows of the same requests by C-ROME, where they were made: the same index, some may be missing if their
            row is felt no more than `most`. None: what is felt more is refused.

    ResultsError for a column or a row that is missing.
    """
    check_number("most", most, error=ResultsError, above=0, most=np.inf)
    names = ["perplexity", "perplexity_before", *unedited.columns]
    for frame in [rows] if instead is None else [rows, instead]:
        if missing := [name for name in ("felt_relative", *names) if name not in frame]:
            raise ResultsError(f"the rows have no column {', '.join(missing)}; edit with guard=nbkit.Guard(math.inf)")
    if len(unedited) != len(rows):
        raise ResultsError(f"{len(unedited)} rows of the unedited model for {len(rows)} edits; give one for each")
    above = ~(rows["felt_relative"] <= most)
    before = unedited.set_axis(rows.index).assign(perplexity=rows["perplexity_before"])
    before["perplexity_before"] = before["perplexity"]
    outcome = pd.Series(np.where(above, REFUSED, PASSED), index=rows.index)
    judged = rows[names].astype(float).where(~above, before[names].astype(float))
    if instead is not None:
        if len(absent := rows.index[above].difference(instead.index)):
            raise ResultsError(f"{len(absent)} edits that are felt more than {most:g} have no row by C-ROME")
        other = instead.reindex(rows.index)
        fits = above & (other["felt_relative"] <= most)
        judged = judged.where(~fits, other[names].astype(float))
        outcome = outcome.mask(fits, FELL_BACK)
    return judged.assign(guard=outcome)


def policies(judged: dict[str, pd.DataFrame], metrics: list[str]) -> pd.DataFrame:
    """One row a policy of `guarded` rows: how many passed, fell back and were refused, the worst and median perplexity
    ratio (infinite where a perplexity is infinite or NaN), the perplexity behind the worst, and the means of `metrics`.
    """
    table = []
    for name, rows in judged.items():
        outcome = rows["guard"].value_counts()
        counts = {what: int(outcome.get(what, 0)) for what in (PASSED, FELL_BACK, REFUSED)}
        ratio = ratios(rows)
        row = {"policy": name, "n": len(rows), **counts, "worst_ratio": ratio.max(), "median_ratio": ratio.median()}
        table.append({**row, "worst_perplexity": counted(rows["perplexity"]).max(), **rows[metrics].mean()})
    return pd.DataFrame(table)
