"""Edits one by one: each request edited on its own into the unedited model, one row a request.

    frame = single_edits(lm, requests, texts, method="rome", key_mode="mixed")
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.errors import RequestError
from nbkit.methods.guard import Guard
from nbkit.models.language_model import LanguageModel
from nbkit.records.lists import as_requests, as_texts
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies.generation import generation_metrics
from nbkit.studies.method_study import (
    MethodStudy,
    by_digest,
    check_arguments,
    described,
    outcome_columns,
    singly_where_one_fails,
)
from nbkit.studies.task_columns import Tasks
from nbkit.studies.task_scores import TASKS

EDITS_AT_ONCE = 64  # edits that are computed, evaluated and stored together


@verb
def single_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    method: str = "rome",
    store: Store | None = None,
    metrics: bool = True,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
    generated: Mapping[str, Any] | None = None,
    guard: Guard | None = None,
    regularise: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    task_limit: int | None = None,
    include_path: Path | str = TASKS,
    **hparams,
) -> pd.DataFrame:
    """Every request edited on its own into the unedited model: one row a request, in order.

    Args:
        texts: for the perplexity ("sentence_mean") of the edited model, and of the unedited one as perplexity_before.
        metrics: whether the edit metrics (`metrics.edit_metrics`, also behind prefixes) are measured too.
        generated: arguments of `generation.generation_metrics` (references, end ...; {} for its defaults), to measure
            what each edited model says by itself too, which takes many times as long as the edit metrics.
        regularise: what every update is regularised by, as in `edit`.
        tasks: tasks that each edited model is scored on, as by `task_scores` with task_limit and include_path; one
            model after another, which takes longer than all else. None: none.

    Columns: the request (case_id as text, subject, subject_kind ...), perplexity, perplexity_before, what the method
    reports (numerator, denominator, signed_denominator, update_norm, key_mode, layer, stop_reason, final_loss, n_steps,
    optimised_probability ...), the edit metrics, those of the prompt and its paraphrases behind prefixes the edit was
    not computed with (means over three) as efficacy_prefixed, paraphrase_prefixed and so on, what is generated,
    task_<name> and task_<name>:stderr of each of the tasks, with _before those of the unedited model, and the
    provenance.
    """
    requests, texts = as_requests(requests), as_texts(texts)
    if not requests:
        raise RequestError("there is no request to edit")
    if generated is not None:
        check_arguments("generated", generated, generation_metrics)
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams, guard, regularise)
    asked_behind = setting.unseen_prefixes if metrics else None
    scored = Tasks(tasks, task_limit, include_path)
    asked: dict[str, Any] = {"metrics": metrics, "asked_behind": asked_behind, **scored.parameters}
    if generated is not None:
        asked["generated"] = digest(dict(generated))
    study = setting.study("single_edits", {"texts": texts, **scored.data}, **asked)
    units = by_digest(requests)

    @cache
    def before() -> dict[str, float]:
        perplexity = setting.readable(measure.perplexity(lm, texts))
        return {"perplexity_before": perplexity, **scored.columns(lm, "_before")}

    def task_columns(made: Edit) -> dict[str, float]:
        if tasks is None:
            return {}
        with applied(lm, made):
            return scored.columns(lm)

    def together(some: Sequence[str]) -> list[tuple[str, list[dict]]]:
        chosen, unedited = [units[unit] for unit in some], before()
        made = setting.edits(chosen)
        after = measure.perplexity(lm, texts, edits=made)
        measured: Sequence[dict] = [{}] * len(chosen)
        if metrics:
            measured = setting.metrics_of_each(chosen, made, measure.neighborhood_tokens(lm, chosen))
        if generated is not None:
            said = generation_metrics(lm, chosen, made, **generated).drop(columns="case_id").to_dict("records")
            measured = [{**row, **more} for row, more in zip(measured, said, strict=True)]
        rows = []
        for unit, request, done, value, row in zip(some, chosen, made, after, measured, strict=True):
            about = {**described(lm, request), "perplexity": value, **unedited}
            rows.append((unit, [{**about, **outcome_columns(done), **row, **task_columns(done)}]))
        return rows

    return study.complete_together(
        [digest(request) for request in requests],
        singly_where_one_fails(together),
        EDITS_AT_ONCE if tasks is None else 1,  # minutes each, which a killed process shall not lose
        setting.task("single edits"),
        "edit",
    )
