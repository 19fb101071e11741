"""What a damaged model still can do: each task score as a share of what the unedited model has above guessing.

    scores = retained(treated_scores(...))       # columns floor, usable and retained beside every score
    models = abilities(scores)                   # one row a model: the mean over tasks, and its worst task

The floor of a task is what a model scores that has lost it: guessing, where an answer is chosen among some, and 0,
where it has to be written. A task counts only where the unedited model is above guessing by more than two standard
errors. Needs no torch.
"""

import numpy as np
import pandas as pd
from sklearn.isotonic import IsotonicRegression

from nbkit.errors import ResultsError


def retained(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of `studies.treated_scores` of one model, with floor, unedited (its score), usable and retained.

    retained is (score - floor) / (unedited - floor): 1 for the unedited model, 0 for none of it, NaN where the task is
    not usable; above 1 where a treatment happens to help. ResultsError without a row of the unedited model for a task.
    """
    unedited = scores[~scores["edited"].astype(bool)].set_index("task")
    missing = sorted(set(scores["task"]) - set(unedited.index))
    if missing or unedited.index.has_duplicates:
        raise ResultsError(
            f"ability is relative to the unedited model: give its scores once for every task of one model "
            f"({', '.join(missing) or 'some tasks have several'})"
        )
    chance = unedited["chance"].fillna(0.0)
    floor = chance.where(unedited["choice"].astype(bool), 0.0)
    usable = unedited["score"] - 2 * unedited["stderr"].fillna(0.0) > chance
    share = (scores["score"] - scores["task"].map(floor)) / scores["task"].map(unedited["score"] - floor)
    return scores.assign(
        floor=scores["task"].map(floor),
        unedited=scores["task"].map(unedited["score"]),
        usable=scores["task"].map(usable),
        retained=share.where(scores["task"].map(usable)),
    )


def abilities(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a treated model, by place: ability (mean retained over usable tasks), worst, worst_task and n_tasks.

    scores: of `retained`. Other columns that are the same in all rows of a model (source, perplexity ...) come along.
    """
    rows = scores[scores["edited"].astype(bool) & scores["usable"].astype(bool)]
    if rows.empty:
        raise ResultsError("there is no task that the unedited model does better than by guessing: score more items")
    by_model = rows.groupby("place", sort=False)
    worst = rows.loc[by_model["retained"].idxmin()].set_index("place")
    same = [name for name in rows if name != "place" and (by_model[name].nunique(dropna=False) == 1).all()]
    same = [name for name in same if name not in ("task", "kind", "metric", "score", "stderr", "retained", "usable")]
    return by_model[same].first().join(
        pd.DataFrame({
            "ability": by_model["retained"].mean(), "worst": worst["retained"], "worst_task": worst["task"],
            "n_tasks": by_model.size(),
        })
    ).reset_index()  # fmt: skip


def misjudged(models: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """The n models that keep least, and the n that keep most, beside what their perplexity lets expect.

    expected: the falling step function of the ratio that fits ability best (isotonic regression over all these models);
    missed: ability less expected, rows in that order, the models that lost more than perplexity says first.
    """
    order = models["ratio"].rank()  # an infinite ratio is the last
    fit = IsotonicRegression(increasing=False).fit(order, models["ability"])
    found = models.assign(expected=fit.predict(order))
    found["missed"] = found["ability"] - found["expected"]
    found = found.sort_values("missed", kind="stable")
    return found.iloc[np.r_[: min(n, len(found)), max(n, len(found) - n) : len(found)]]
