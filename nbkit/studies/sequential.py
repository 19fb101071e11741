"""Edits in sequence: requests edited into one model, one after another or batch after batch, one row an edit.

    frame = sequential_edits(lm, requests, texts, seeds=[0, 1, 2], method="rome", n_edits=100)
    frame = sequential_edits(lm, requests, texts, seeds=[0, 1, 2], method="rome", n_edits=200)   # edits the other 100
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.errors import RequestError
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.methods.guard import Guard
from nbkit.methods.verbs import together_of
from nbkit.models.generation import generated as generate
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import check_number, check_text
from nbkit.records.lists import as_requests, as_texts, check_seeds
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest
from nbkit.records.results import Store
from nbkit.studies.in_sequence import InSequence
from nbkit.studies.method_study import MethodStudy, check_arguments
from nbkit.studies.orders import Orders, checked_n_edits
from nbkit.studies.task_columns import Tasks
from nbkit.studies.task_scores import TASKS


@verb
def sequential_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    method: str = "rome",
    evaluate_every: int = 1,
    n_edits: int | None = None,
    group: str | None = None,
    store: Store | None = None,
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    guard: Guard | None = None,
    generated: Mapping[str, Any] | None = None,
    text_moment: SecondMomentLike = None,
    per_step: int = 1,
    regularise: Mapping[str, Any] | None = None,
    tasks: Sequence[str] | None = None,
    task_limit: int | None = None,
    include_path: Path | str = TASKS,
    drift: bool = True,
    **hparams,
) -> pd.DataFrame:
    """Requests edited into one model one after another, in an order shuffled by each seed: one row an edit.

    Args:
        n_edits: each order takes the first so many of its permutation of all `requests`; None: all. The first 100 of
            200 are those of 100, so a longer sequence of the same requests computes only what is new. Another list of
            requests is another study, also one that begins with this list.
        per_step: how many requests each edit carries, more than one for methods that make batches. The last carries
            those that are left, and is made anew, with the requests that follow, in a longer sequence.
        evaluate_every: the model is measured after so many requests (after the edit that reaches them), and after the
            last one; there `checkpoint` is True. n_edits 0 is the model before any.
        group: a name for these requests ("hard", say), put into the column `group`.
        generated: arguments of `models.generation.generated` (max_tokens, end ...), to measure what the model says by
            itself after each prompt too, which takes many times as long as the rest.
        text_moment: second moments of ordinary text, for drift_felt; None: of the unedited model on its default text,
            cached, where it brings one.
        regularise: what every update is regularised by, as in `edit_sequence`.
        tasks: tasks that are scored at every checkpoint, and of the model before any edit, as by `task_scores` with
            task_limit and include_path; None: none.
        drift: whether its columns are measured; for drift_felt second moments are taken of every layer that is changed,
            once for each, which can take longer than the edits.

    Columns: seed, group, n_edits (requests edited so far), the edited request (with per_step above 1: case_id and
    subject_kind of all, and n_requests), what the method reports of its edit, and each metric m of
    `metrics.edit_metrics` (with `generated` also efficacy_generated: the text begins with the new target) as m_last
    (this edit, right after it; a mean over its requests) and m_after (mean of m_last over the requests so far). At a
    checkpoint, and NaN elsewhere: perplexity; m (mean of all edits so far, on the model now); forgotten:
    efficacy_argmax_after less efficacy_argmax, the share that was said right after less the share that is said now
    (forgotten_generated likewise), below 0 where later edits help; drift (‖ΔW‖_F of all changed weights against the
    unedited model), drift_felt (√E‖ΔW k‖²) and drift_felt_relative (that over √E‖W k‖² of the unedited weights), see
    keys/drift.py: NaN without second moments, and where no MLP projection is changed; task_<name> and
    task_<name>:stderr of each of the tasks.

    A sequence that breaks the model goes on to its end. One that is interrupted or killed goes on from its last state
    (studies/orders.py), to the same rows. ResultsError for a damaged state or one of another study, naming the file.
    """
    check_number("evaluate_every", evaluate_every, whole=True, least=1)
    check_number("per_step", per_step, whole=True, least=1)
    if per_step > 1:
        together_of(method)
    requests, texts, seeds = as_requests(requests), as_texts(texts), check_seeds(seeds)
    if not requests:
        raise RequestError("there is no request to edit")
    n_edits = checked_n_edits(n_edits, requests)
    if group is not None:
        check_text("group", group)
    scored = Tasks(tasks, task_limit, include_path)
    asked: dict[str, Any] = {"evaluate_every": evaluate_every, **scored.parameters}
    if generated is not None:
        check_arguments("generated", generated, generate)
        asked["generated"] = digest(dict(generated))
    if text_moment is not None:
        asked["text_moment"] = digest(text_moment)
    if per_step > 1:
        asked["per_step"] = int(per_step)
    if not drift:
        asked["drift"] = False
    setting = MethodStudy(lm, method, context_templates, second_moment, store, hparams, guard, regularise)
    study = setting.study("sequential_edits", {"texts": texts, "requests": requests, **scored.data}, **asked)
    text_moments = None if text_moment is None else SecondMoments(text_moment, lm)
    measuring = InSequence(lm, texts, generated, text_moments, scored, drift)
    orders = Orders(setting, study, measuring, requests, n_edits, evaluate_every, per_step)

    units = [unit for seed in seeds for unit in orders.units(seed)]
    label = setting.task("sequences" + (f" of {group} requests" if group else ""))
    frame = study.complete_together(units, orders.segments, len(units) // len(seeds), label, "edit")
    frame = frame.drop_duplicates(["seed", "n_edits"], keep="last", ignore_index=True)  # the end has the last word
    frame.insert(0, "group", group)  # a name, which determines no number, and so is not stored
    return frame
