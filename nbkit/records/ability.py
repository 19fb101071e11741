"""What a damaged model still can do: each task score as a share of what the unedited model has above guessing.

    scores = retained(treated_scores(...))       # columns floor, usable and retained beside every score
    models = abilities(scores)                   # one row a model: the mean over tasks, and its worst task
    rows = with_ability(rows, chance)            # the same of rows that have a column task_<name> for each task
    rows = with_ability_by_model(rows, {model: scores.set_index("task"), ...})       # the same of several models

The floor of a task is what a model scores that has lost it: guessing, where an answer is chosen among some, and 0,
where it has to be written. A task counts only where the unedited model is above guessing by more than two standard
errors. Needs no torch.
"""

from collections.abc import Mapping

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


def scored_tasks(frame: pd.DataFrame) -> list[str]:
    """The names of the tasks whose scores are columns task_<name>; those with a colon hold something else of a task."""
    return [str(name).removeprefix("task_") for name in frame if str(name).startswith("task_") and ":" not in str(name)]


def with_ability(rows: pd.DataFrame, chance: Mapping[str, float]) -> pd.DataFrame:
    """The rows of one model with ability and worst: the mean and the least over tasks of the share of the unedited
    score above chance that is kept, as in `retained`, which has standard errors to leave tasks out by.

    rows: n_edits and a column task_<name> for each task; those of n_edits 0 are of the unedited model, whatever else
    they are of. chance: {task: what guessing scores}, 0 where the answer is written. A task that the unedited model
    does not better than chance is left out. ResultsError without a chance for each task or without one unedited score.
    """
    names = [f"task_{task}" for task in scored_tasks(rows)]
    missing = [name.removeprefix("task_") for name in names if name.removeprefix("task_") not in chance]
    if missing or not names:
        raise ResultsError(f"chance is not given for {', '.join(missing)}" if names else "no column is a task_<name>")
    unedited = rows.loc[rows["n_edits"] == 0, names].drop_duplicates()
    if len(unedited) != 1:
        raise ResultsError(f"ability is relative to the unedited model, of which there are {len(unedited)} sets of "
                           "scores: give rows of one model, with n_edits 0 for it")  # fmt: skip
    floor = pd.Series({name: float(chance[name.removeprefix("task_")]) for name in names})
    above = unedited.iloc[0] - floor
    if not (above > 0).any():
        raise ResultsError("there is no task that the unedited model does better than by guessing")
    kept = ((rows[names] - floor) / above)[above.index[above > 0]]
    return rows.assign(ability=kept.mean(axis=1, skipna=False), worst=kept.min(axis=1, skipna=False))


def with_ability_by_model(rows: pd.DataFrame, unedited: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`with_ability` of the rows of several models (column model), each by the tasks that it does when unedited.

    unedited: {model: rows of `retained`, task as index}, of the unedited model. The columns of tasks that are not
    usable there are left out. Index numbered anew, models one after another.
    """
    parts = []
    for model, of in rows.groupby("model", sort=False):
        usable = unedited[model]["usable"]
        of = of.drop(columns=[f"task_{task}" for task in usable.index[~usable]])
        parts.append(with_ability(of, unedited[model].loc[usable, "floor"].to_dict()))
    return pd.concat(parts, ignore_index=True)


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
