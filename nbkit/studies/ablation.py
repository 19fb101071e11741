"""ROME taken apart: the same requests edited by variants that differ in which keys the update is made of, and in C.

    C_ROME = {"key_mode": "prefixed", "second_moment": None}
    frame = rome_ablation(lm, requests, texts, {"ROME": {"key_mode": "mixed", "second_moment": None}, "C-ROME": C_ROME})

Of all that an edit by ROME takes, the search for v* is nearly all, and it knows neither the key mode nor C. So the
variants share one search a request, and a whole table of them takes little longer than one. What the search does depend
on (the context templates, what v* starts from) is given once, so that each such setting is a call of its own.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.errors import MethodError, RequestError
from nbkit.keys.solving import SecondMoments
from nbkit.methods.rome import rome_variants
from nbkit.methods.verbs import settings_for
from nbkit.models.language_model import LanguageModel
from nbkit.records.lists import as_requests, as_texts
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies.method_study import MethodStudy, by_digest, described, outcome_columns, singly_where_one_fails
from nbkit.studies.single import EDITS_AT_ONCE

FREE = ("key_mode", "second_moment")  # what variants may differ in


@verb
def rome_ablation(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    variants: Mapping[str, Mapping[str, Any]],
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    **hparams,
) -> pd.DataFrame:
    """Every request edited on its own by each variant of ROME: one row a request and variant, request by request.

    Args:
        texts: for perplexity, as in `single_edits`.
        variants: {name: {"key_mode": ..., "second_moment": ...}}, both given; the second moment is a matrix, one by
            layer, or None.
        store, context_templates, hparams: as in `single_edits`, for all variants; without a key_mode.

    Columns: variant, and those of `single_edits` with its edit metrics, also behind prefixes that no edit was computed
    with. The model is unchanged. RequestError without a request; MethodError for a variant that has not these two.
    """
    requests, texts = as_requests(requests), as_texts(texts)
    if not requests:
        raise RequestError("there is no request to edit")
    for name, variant in variants.items():
        if set(variant) != set(FREE):
            raise MethodError(
                f"the variant {name!r} must have {' and '.join(FREE)}, not {', '.join(variant) or 'none'}"
            )
    if not variants or "key_mode" in hparams:
        raise MethodError("variants must name one or more, each with its key_mode, which is no hyper-parameter of all")
    setting = MethodStudy(lm, "rome", context_templates, None, store, hparams)
    given = {id(variant["second_moment"]): variant["second_moment"] for variant in variants.values()}
    moments = {number: SecondMoments(each, lm) for number, each in given.items()}  # variants share a factorisation
    digests = {number: None if each is None else digest(each) for number, each in given.items()}
    named = [[name, each["key_mode"], digests[id(each["second_moment"])]] for name, each in variants.items()]
    asked = {"variants": named, "asked_behind": setting.unseen_prefixes}
    study, units = setting.study("rome_ablation", {"texts": texts}, **asked), by_digest(requests)

    @cache
    def before() -> float:
        return setting.readable(measure.perplexity(lm, texts))

    @cache
    def settings() -> dict:
        templates = setting.arguments["context_templates"]
        return {
            name: settings_for(
                lm, "rome", templates, moments[id(each["second_moment"])], {**hparams, "key_mode": each["key_mode"]}
            )
            for name, each in variants.items()
        }

    def together(some: Sequence[str]) -> list[tuple[str, list[dict]]]:
        chosen, (first, *_) = [units[unit] for unit in some], settings().values()
        made = rome_variants(lm, chosen, first, list(settings().values()))
        reference, rows = measure.neighborhood_tokens(lm, chosen), {unit: [] for unit in some}
        for name, edits in zip(variants, zip(*made, strict=True), strict=True):
            after = measure.perplexity(lm, texts, edits=edits)
            measured = setting.metrics_of_each(chosen, edits, reference)
            for unit, request, edit, value, row in zip(some, chosen, edits, after, measured, strict=True):
                about = {"variant": name, **described(lm, request), "perplexity": value, "perplexity_before": before()}
                rows[unit].append({**about, **outcome_columns(edit), **row})
        return list(rows.items())

    return study.complete_together(
        [digest(request) for request in requests],
        singly_where_one_fails(together),
        EDITS_AT_ONCE,
        f"{lm.title}: variants of rome",
        "request",
    )
