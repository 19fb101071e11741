"""Edits of many requests at once, each of the unedited model: one row a batch.

    frame = batch_edits(lm, requests, texts, batch_sizes=[1, 10, 100], seeds=[0, 1, 2], method="memit")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.edits.overlays import applied
from nbkit.errors import RequestError
from nbkit.keys.solving import SecondMomentLike
from nbkit.methods.guard import Guard
from nbkit.methods.verbs import edit_batch, together_of
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_number
from nbkit.records.lists import as_list, as_requests, as_texts, check_seeds
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies.in_sequence import InSequence
from nbkit.studies.method_study import MethodStudy, outcome_columns
from nbkit.studies.orders import in_order
from nbkit.studies.task_columns import Tasks
from nbkit.studies.task_scores import TASKS

UNEDITED = "unedited"


@verb
def batch_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    batch_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    method: str = "memit",
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    guard: Guard | None = None,
    regularise: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    task_limit: int | None = None,
    include_path: Path | str = TASKS,
    drift: bool = True,
    **hparams,
) -> pd.DataFrame:
    """The first so many requests of an order shuffled by each seed as ONE edit of the unedited model: one row an edit.

    Args:
        batch_sizes: how many, one edit for each. The smaller batch of a seed is part of the larger.
        regularise: what the update is regularised by, as in `edit_batch`.
        tasks: tasks that each model is scored on, as by `task_scores` with task_limit and include_path; None: none.
        drift: whether its columns are measured, as in `sequential_edits`.

    Columns: seed, n_edits (the size of the batch; 0 is the unedited model, measured once and listed for every seed),
    perplexity, each metric of `metrics.edit_metrics` (mean over the batch), what the method reports, drift, drift_felt
    and drift_felt_relative as in `sequential_edits`, task_<name> and task_<name>:stderr, and the provenance.

    MethodError for a method that makes one edit of one request; RequestError for a batch larger than there are
    requests.
    """
    together_of(method)
    requests, texts, seeds = as_requests(requests), as_texts(texts), check_seeds(seeds)
    batch_sizes = check_sizes(batch_sizes, len(requests))
    scored = Tasks(tasks, task_limit, include_path)
    asked = scored.parameters if drift else {**scored.parameters, "drift": False}
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams, guard, regularise)
    study = setting.study("batch_edits", {"texts": texts, "requests": requests, **scored.data}, **asked)
    measuring = InSequence(lm, texts, tasks=scored, drift=drift)

    def compute(unit: str) -> list[dict[str, Any]]:
        if unit == UNEDITED:
            perplexity = setting.readable(measure.perplexity(lm, texts))
            return [{"n_edits": 0, "perplexity": perplexity, **measuring.drifted(), **measuring.scored()}]
        seed, size = (int(part) for part in unit.split())
        batch = in_order(requests, seed)[:size]
        measuring.compare_with(batch)
        made = edit_batch(lm, batch, **setting.arguments)
        with applied(lm, made):
            return [{"n_edits": size, **outcome_columns(made), **measuring.of_model(batch)}]

    units = [unit for seed in seeds for unit in (UNEDITED, *(f"{seed} {size}" for size in batch_sizes))]
    frame = study.complete(units, compute, setting.task("batches"), each="batch")
    frame.insert(0, "seed", [seed for seed in seeds for _ in range(1 + len(batch_sizes))])
    return frame


def check_sizes(sizes: Sequence[int], n_requests: int) -> list[int]:
    """Sizes of batches, the same one once; an error for what is none, and for one larger than there are requests."""
    sizes = as_list("batch_sizes", sizes, "whole numbers", RequestError)
    for size in sizes:
        check_number("each of batch_sizes", size, whole=True, least=1)
        if size > n_requests:
            raise RequestError(f"a batch of {size} is asked for, and there are {n_requests} requests to edit")
    if not sizes:
        raise RequestError("batch_sizes is empty: there is no batch to edit")
    return list(dict.fromkeys(sizes))
