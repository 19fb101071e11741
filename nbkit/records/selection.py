"""Which of many damaged models are scored: drawn at random within bins of how far perplexity rose, scores unseen.

    places = stratified(rows, n=24, seed=0)      # rows of `studies.treated_perplexity`
    selected(rows, places)                       # of how many candidates in each bin

Most edits hardly move perplexity, so a plain sample would lie in one place, and models picked evenly on a log scale
from the least to the largest perplexity would be mostly wrecks, over which any rank correlation is large. Needs no
torch.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from nbkit.errors import ResultsError
from nbkit.records.bounds import check_number
from nbkit.records.collapse import ratios

EDGES = (1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 100.0)  # between bins: four of ten below 1.5 times, eight below 10


def bins(rows: pd.DataFrame, edges: Sequence[float] = EDGES) -> pd.Series:
    """The bin of each row's perplexity over perplexity_before, "1.05 to 1.1" say, ordered; NaN is in the last."""
    edges = list(edges)
    if not edges or any(not isinstance(edge, int | float) for edge in edges) or edges != sorted(set(edges)):
        raise ResultsError(f"edges of bins must be rising numbers, not {edges}")
    inner = [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    names = [f"below {edges[0]:g}", *inner, f"{edges[-1]:g} and more"]
    return pd.Series(
        pd.Categorical.from_codes(np.digitize(ratios(rows), edges), names, ordered=True), rows.index, name="bin"
    )


def stratified(rows: pd.DataFrame, n: int, edges: Sequence[float] = EDGES, seed: int = 0) -> list[int]:
    """Places of `n` rows, or of fewer: no bin gives more than twice its even share, to make up for one that has none.

    Bins take turns, in random order, each giving one row; within a bin its sources take turns, in random order, each
    giving a random row. Of rows of the same draw (one sequence, one edit scaled) only one is taken, so that what is
    taken are different edits.

    Args:
        rows: perplexity, perplexity_before, source and draw, one row a model. No score is looked at.
    """
    check_number("n", n, whole=True, least=1, error=ResultsError)
    random, of_bin = np.random.default_rng(seed), bins(rows, edges)
    waiting: dict[str, dict[str, list[int]]] = {}
    for place in random.permutation(len(rows)).tolist():
        waiting.setdefault(of_bin.iloc[place], {}).setdefault(rows["source"].iloc[place], []).append(place)
    chosen, taken, most = [], set(), math.ceil(2 * n / len(of_bin.cat.categories))
    for _ in range(most):
        for name in random.permutation(sorted(waiting)).tolist() if waiting else ():
            place = _next(waiting[name], rows["draw"], taken)
            if place is None:
                del waiting[name]
            elif len(chosen) < n:
                chosen.append(place)
                taken.add(rows["draw"].iloc[place])
    return sorted(chosen)


def _next(sources: dict[str, list[int]], draws: pd.Series, taken: set[str]) -> int | None:
    """The next place of a bin; its source goes to the end of the queue."""
    for source in list(sources):
        places = sources.pop(source)
        while places:
            place = places.pop()
            if draws.iloc[place] not in taken:
                sources[source] = places
                return place
    return None


def selected(rows: pd.DataFrame, places: Sequence[int], edges: Sequence[float] = EDGES) -> pd.DataFrame:
    """One row a bin: candidates, of how many sources, and how many were selected, of how many sources."""
    binned = rows.assign(bin=bins(rows, edges))
    each = [
        part.groupby("bin", observed=False)["source"]
        .agg(["size", "nunique"])
        .set_axis([name, f"sources_{name}"], axis=1)
        for name, part in (("candidates", binned), ("selected", binned.iloc[list(places)]))
    ]
    return each[0].join(each[1])
