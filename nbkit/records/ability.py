"""What an edited model can still do: its task scores as shares of what the unedited model does above guessing.

    kept = ability.retained(scores, by=["method", "prompt"])    # one row an edited model

Perplexity tenfold is a lenient line: a model may have lost one task well below it. So beside it stands a rule of this
project: an edit *breaks the tasks* when any of them has lost half or more of what the unedited model does above chance.
Needs no torch.
"""

from collections.abc import Sequence

import pandas as pd

from nbkit.errors import ResultsError

LOST = 0.5  # the share of a task at which, and below, it counts as lost
ABOVE = 1.96  # standard errors that the unedited score must lie above chance


def above_chance(scores: pd.DataFrame) -> list[str]:
    """Tasks whose unedited score lies above chance by more than 1.96 of its standard errors, in the rows' order."""
    unedited = scores[~scores["edited"].astype(bool)].drop_duplicates("task")
    clear = unedited["score"] - ABOVE * unedited["stderr"] > unedited["chance"]
    return unedited.loc[clear, "task"].tolist()


def retained(scores: pd.DataFrame, by: str | Sequence[str] = "case_id") -> pd.DataFrame:
    """How much of its tasks each edited model still does.

    Args:
        scores: rows of `studies.task_correlation` of one model: edited, task, score, stderr, chance, perplexity, `by`.
        by: the column, or columns, that name an edited model.

    One row an edited model, in order: `by`, perplexity, retained (mean over the tasks that the unedited model does
    above chance of (score - chance) / (unedited - chance): 1 is unharmed, 0 guessing, below it worse than guessing, as
    where exact words are asked for), least and least_task (the task that has lost most), lost (how many tasks have lost
    half), breaks_tasks (whether any has) and n_tasks.
    ResultsError where the unedited model does no task above chance, or there is no unedited model.
    """
    by = [by] if isinstance(by, str) else list(by)
    tasks = above_chance(scores)
    if not tasks:
        raise ResultsError(
            "no task lies above chance in the unedited model's rows, so nothing can be retained of one; score more "
            "items, or tasks that the model can do"
        )
    edited = scores["edited"].astype(bool)
    unedited = scores[~edited].drop_duplicates("task").set_index("task")["score"]
    rows = scores[edited & scores["task"].isin(tasks)]
    share = (rows["score"] - rows["chance"]) / (rows["task"].map(unedited) - rows["chance"])
    kept = []
    for names, part in rows.assign(share=share).groupby(by, sort=False):
        least = part.loc[part["share"].idxmin()]
        about = dict(zip(by, names, strict=True)) | {"perplexity": part["perplexity"].iloc[0]}
        lost = int((part["share"] <= LOST).sum())
        about |= {"retained": part["share"].mean(), "least": least["share"], "least_task": least["task"]}
        kept.append(about | {"lost": lost, "breaks_tasks": lost > 0, "n_tasks": len(part)})
    return pd.DataFrame(kept)
