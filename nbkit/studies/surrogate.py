"""Perplexity as a surrogate: perplexity and task scores of the unedited model and of singly edited ones.

    frame = task_correlation(lm, requests, texts)
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from nbkit.edits.door import verb
from nbkit.edits.overlays import applied
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_number
from nbkit.records.lists import as_requests, as_texts
from nbkit.records.provenance import digest, files_digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies import task_scores as tasks
from nbkit.studies.method_study import MethodStudy, by_digest, described, outcome_columns


@verb
def task_correlation(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    task_names: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str = tasks.TASKS,
    method: str = "rome",
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
    **hparams,
) -> pd.DataFrame:
    """Perplexity and task scores of the unedited model and of each singly edited one: one row per model and task.

    Args:
        requests: one edited model each; `spread` picks some that span the range of perplexities.
        task_names, limit, include_path: as in `tasks.task_scores`.

    Columns: edited (False for the unedited model, first), the request, perplexity, task, kind, metric, score, stderr,
    chance, n (items scored), and the provenance.
    """
    requests, texts = as_requests(requests), as_texts(texts)
    tasks.check_tasks(task_names, limit, include_path)
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams)
    names = None if task_names is None else list(task_names)
    data = {"texts": texts, "tasks": files_digest(Path(include_path))}
    if not set(names or ()) <= set(tasks.task_names(include_path)):
        data["lm_eval"] = version("lm_eval")  # whose tasks these are
    study = setting.study("task_correlation", data, tasks=names, limit=limit)
    units = by_digest(requests)

    def scored(about: dict) -> list[dict]:
        scores = tasks.task_scores(lm, names, limit=limit, include_path=include_path)
        about = {**about, "perplexity": measure.perplexity(lm, texts)}
        return [{**about, **row} for row in scores.to_dict("records")]

    def compute(unit: str) -> list[dict]:
        if unit == "unedited":
            return scored({"edited": False})
        (made,) = setting.edits([units[unit]])
        with applied(lm, made):
            return scored({"edited": True, **described(lm, units[unit]), **outcome_columns(made)})

    asked = ["unedited", *(digest(request) for request in requests)]
    return study.complete(asked, compute, setting.task("task scores"), each="model")


def spread(perplexity: Sequence[float], n: int) -> list[int]:
    """Places of `n` models whose perplexities lie as evenly as can be on a log scale, from the least to the largest.

    Infinite and NaN perplexities count as the largest finite one. All places, in order, if there are no more than n.
    """
    check_number("n", n, whole=True, least=1)
    values = np.asarray(perplexity, float)
    if n >= len(values):
        return list(range(len(values)))
    finite = values[np.isfinite(values)]
    logs = np.log(np.where(np.isfinite(values), values, finite.max() if len(finite) else 1.0))
    chosen: list[int] = []
    for goal in np.linspace(logs.min(), logs.max(), n):
        distance = np.abs(logs - goal)
        distance[chosen] = np.inf
        chosen.append(int(distance.argmin()))
    return sorted(chosen)
