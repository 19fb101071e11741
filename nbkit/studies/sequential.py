"""Edits in sequence: all requests edited into one model, one after another, one row an edit.

    frame = sequential_edits(lm, requests, texts, seeds=[0, 1, 2], method="rome")
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache

import numpy as np
import pandas as pd

from nbkit.edits.door import verb
from nbkit.errors import RequestError
from nbkit.methods.guard import Guard
from nbkit.methods.verbs import edit_sequence
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_number, check_text
from nbkit.records.lists import as_requests, as_texts, check_seeds
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies import metrics as measure
from nbkit.studies.method_study import MethodStudy, described, outcome_columns


@verb
def sequential_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    method: str = "rome",
    evaluate_every: int = 1,
    group: str | None = None,
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
    guard: Guard | None = None,
    **hparams,
) -> pd.DataFrame:
    """All requests edited into one model one after another, in an order shuffled by each seed: one row an edit.

    Args:
        evaluate_every: perplexity and the metrics of all edits so far are measured after so many edits, and after the
            last one; there `checkpoint` is True, elsewhere those columns are NaN. n_edits 0 is the unedited model.
        group: a name for these requests ("hard", say), put into the column `group`.

    Columns: seed, group, n_edits, the edited request, perplexity, and each metric m of `metrics.edit_metrics` as
    m (mean of all edits so far, on the model now), m_last (this edit, right after it) and m_after (mean of m_last so
    far): m below m_after is forgetting. A sequence that breaks the model goes on to its end. A finished sequence is
    never computed again; one that was interrupted in the middle starts anew.
    """
    check_number("evaluate_every", evaluate_every, whole=True, least=1)
    requests, texts, seeds = as_requests(requests), as_texts(texts), check_seeds(seeds)
    if not requests:
        raise RequestError("there is no request to edit")
    if group is not None:
        check_text("group", group)
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams, guard)
    data = {"texts": texts, "requests": requests}
    study = setting.study("sequential_edits", data, evaluate_every=evaluate_every)

    @cache
    def reference() -> dict:
        return measure.neighborhood_tokens(lm, requests)

    def compute(unit: str) -> Iterator[dict]:
        seed = int(unit)
        order = [requests[i] for i in np.random.default_rng(seed).permutation(len(requests))]
        unedited = reference()
        before = setting.readable(measure.perplexity(lm, texts))
        yield {"seed": seed, "n_edits": 0, "checkpoint": True, "perplexity": before}
        right_after = []
        # Closed by hand: a traceback kept by a notebook would keep the generator, and the edits in the weights, alive.
        with closing(edit_sequence(lm, order, progress=False, **setting.arguments)) as steps:
            for step in steps:
                done, checkpoint = step.index + 1, (step.index + 1) % evaluate_every == 0
                last = setting.metrics_of(step.request, unedited)
                right_after.append(last)
                row = {"seed": seed, "n_edits": done, "checkpoint": checkpoint or done == len(order)}
                row |= {**described(lm, step.request), **outcome_columns(step.edit)}
                row |= {f"{name}_last": value for name, value in last.items()}
                row |= {f"{name}_after": value for name, value in pd.DataFrame(right_after).mean().items()}
                row |= dict.fromkeys(["perplexity", *last], np.nan)
                if row["checkpoint"]:
                    row["perplexity"] = measure.perplexity(lm, texts)
                    so_far = measure.edit_metrics(lm, order[:done], unedited)
                    row |= so_far[list(last)].mean().to_dict()
                yield row

    label = setting.task("sequences" + (f" of {group} requests" if group else ""))
    frame = study.complete([str(seed) for seed in seeds], compute, label, len(requests) + 1, "edit")
    frame.insert(0, "group", group)  # a name, which determines no number, and so is not stored
    return frame
