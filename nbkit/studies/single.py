"""Edits one by one: each request edited on its own into the unedited model, one row a request.

    frame = single_edits(lm, requests, texts, method="rome", key_mode="mixed")
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
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
    **hparams,
) -> pd.DataFrame:
    """Every request edited on its own into the unedited model: one row a request, in order.

    Args:
        texts: for the perplexity ("sentence_mean") of the edited model, and of the unedited one as perplexity_before.
        metrics: whether the edit metrics (`metrics.edit_metrics`, also behind prefixes) are measured too.
        generated: arguments of `generation.generation_metrics` (references, end ...; {} for its defaults), to measure
            what each edited model says by itself too, which takes many times as long as the edit metrics.

    Columns: the request (case_id as text, subject, subject_kind ...), perplexity, perplexity_before, what the method
    reports (numerator, denominator, signed_denominator, update_norm, key_mode, layer, stop_reason, final_loss, n_steps,
    optimised_probability ...), the edit metrics, those of the prompt and its paraphrases behind prefixes the edit was
    not computed with (means over three) as efficacy_prefixed, paraphrase_prefixed and so on, what is generated, and the
    provenance.
    """
    requests, texts = as_requests(requests), as_texts(texts)
    if not requests:
        raise RequestError("there is no request to edit")
    if generated is not None:
        check_arguments("generated", generated, generation_metrics)
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams, guard)
    asked_behind = setting.unseen_prefixes if metrics else None
    asked = {"metrics": metrics, "asked_behind": asked_behind}
    if generated is not None:
        asked["generated"] = digest(dict(generated))
    study = setting.study("single_edits", {"texts": texts}, **asked)
    units = by_digest(requests)

    @cache
    def before() -> float:
        return setting.readable(measure.perplexity(lm, texts))

    def together(some: Sequence[str]) -> list[tuple[str, list[dict]]]:
        chosen = [units[unit] for unit in some]
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
            about = {**described(lm, request), "perplexity": value, "perplexity_before": before()}
            rows.append((unit, [{**about, **outcome_columns(done), **row}]))
        return rows

    return study.complete_together(
        [digest(request) for request in requests],
        singly_where_one_fails(together),
        EDITS_AT_ONCE,
        setting.task("single edits"),
        "edit",
    )
