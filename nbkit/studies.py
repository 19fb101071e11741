"""Three studies, each one call and one table of rows: edits one by one, edits in sequence, perplexity against tasks.

    frame = single_edits(lm, requests, texts, method="rome", key_mode="mixed")

Rows are stored under a key made of the model, the data, every parameter and the code (`results.py`), so a study that is
interrupted goes on where it was, one with more requests or seeds computes only those, and one that is all there takes
no time. Requests count by their content, not by their place in the list; what a row was computed together with changes
it by no more than rounding.

Every study takes a `store` (None: `runs/results`), the `method` with its hyper-parameters, and `context_templates` and
`second_moment` as in `nbkit.edit`. The model is unchanged afterwards, also after an interrupt. An infinite or NaN
perplexity is a result, stored as such.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nbkit import metrics as measure
from nbkit import prompts, tasks
from nbkit.edits import Edit, applied
from nbkit.errors import NbkitError
from nbkit.methods import METHODS, as_templates, edit, edit_sequence, hyper_parameters, needed_moments
from nbkit.models import LanguageModel
from nbkit.moments import SecondMoments
from nbkit.provenance import code_version, digest, files_digest
from nbkit.requests import EditRequest
from nbkit.results import Store, Study, provenance

EDITS_AT_ONCE = 64  # edits of a study that are computed, evaluated and stored together


class _Setting:
    """What the studies share: the model, the method with all its parameters, and where rows go."""

    def __init__(self, lm: LanguageModel, method: str, context_templates, second_moment, store: Store | None, hparams):
        self.lm, self.method, self.hparams = lm, method, hparams
        parameters = hyper_parameters(lm, method, **hparams)  # checks them before any work
        second_moment = needed_moments(lm, method, parameters, second_moment)
        self.moments = None if second_moment is None else SecondMoments(second_moment, lm)  # factored once
        self.store = Store() if store is None else store
        self.given_templates = None if context_templates is None else list(context_templates)
        self.parameters = dataclasses.asdict(parameters)
        self.parameters |= {
            "method": method,
            "context_templates": self.given_templates,
            "second_moment": None if second_moment is None else digest(second_moment),
        }
        read = [path for path in METHODS[method].files(lm, parameters) if path.is_file()]
        if read:
            self.parameters["files"] = [sha256(path.read_bytes()).hexdigest() for path in read]

    def study(self, name: str, data: dict[str, Any], **parameters) -> Study:
        """The stored study of these data and parameters, and those of the method."""
        parameters = {**self.parameters, **parameters}
        hashes = {name: digest(value) for name, value in data.items()}
        key = {"model": self.lm.hash, "dtype": str(self.lm.dtype), "code": code_version()}
        key |= {"data": hashes, "parameters": parameters}
        return self.store.study(name, key, provenance(self.lm, data_hash=hashes, parameters=parameters))

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `edit` and `edit_sequence`; context templates are sampled here once, if none are given."""
        return {
            "method": self.method,
            "context_templates": as_templates(self.lm, self.given_templates, self.method),
            "second_moment": self.moments,
            "progress": False,
            **self.hparams,
        }

    @cached_property
    def test_prefixes(self) -> list[str]:
        """What a prompt is asked behind: the given context templates, or ROME's, whatever the method's own are."""
        return as_templates(self.lm, self.given_templates)[1:]

    def edits(self, requests: Sequence[EditRequest]) -> list[Edit]:
        return edit(self.lm, requests, **self.arguments)

    def metrics_of(self, request: EditRequest, reference: dict) -> dict[str, float]:
        """The edit metrics of one request on the model as it is."""
        (row,) = measure.edit_metrics(self.lm, [request], reference).drop(columns="case_id").to_dict("records")
        return row

    def metrics_of_each(
        self, requests: Sequence[EditRequest], made: Sequence[Edit], reference: dict
    ) -> list[dict[str, float]]:
        """The edit metrics of each request on the model with its own edit, `_prefixed` ones too.

        Those ask the rewrite prompt behind one of the sampled prefixes, as in The Fall of ROME; which
        one is drawn by the request's content.
        """
        frame = measure.edit_metrics(self.lm, requests, reference, edits=made).drop(columns="case_id")
        prefixes = self.test_prefixes
        if prefixes:
            alone = [
                dataclasses.replace(request, paraphrase_prompts=(), neighborhood_prompts=(), neighborhood_targets=())
                for request in requests
            ]
            drawn = [prefixes[int(digest(request), 16) % len(prefixes)] for request in requests]
            behind = measure.edit_metrics(self.lm, alone, prefix=drawn, edits=made)
            for name in ("efficacy", "efficacy_argmax", "target_probability", "reliability"):
                frame[f"{name}_prefixed"] = behind[name]
        return frame.to_dict("records")


def _units(requests: Sequence[EditRequest]) -> dict[str, EditRequest]:
    return {digest(request): request for request in requests}


def _described(lm: LanguageModel, request: EditRequest) -> dict[str, Any]:
    return {
        "case_id": None if request.case_id is None else str(request.case_id),
        "prompt": request.prompt,
        "subject": request.subject,
        "subject_kind": prompts.subject_kind(lm, request),
        "target_new": request.target_new,
        "target_true": request.target_true,
        "relation_id": request.relation_id,
    }


def _outcome(made: Edit) -> dict[str, Any]:
    """The numbers and words of an edit's info; its target probability is that of the search for v*, so it says so."""
    row = {"method": made.method}
    row |= {name: value for name, value in made.info.items() if isinstance(value, (str, bool, int, float))}
    losses = made.info.get("losses") or [[float("nan")]]
    row |= {"final_loss": losses[-1][0], "n_steps": len(made.info.get("losses", []))}
    if "target_probability" in row:
        row["optimised_probability"] = row.pop("target_probability")
    return row


def single_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    method: str = "rome",
    store: Store | None = None,
    metrics: bool = True,
    context_templates: Sequence[str] | None = None,
    second_moment=None,
    **hparams,
) -> pd.DataFrame:
    """Every request edited on its own into the unedited model: one row a request, in order.

    Args:
        texts: for the perplexity ("sentence_mean") of the edited model, and of the unedited one as perplexity_before.
        metrics: whether the edit metrics (`metrics.edit_metrics`, also behind a prefix) are measured too.

    Columns: the request (case_id as text, subject, subject_kind ...), perplexity, perplexity_before, what the method
    reports (numerator, denominator, update_norm, key_mode, layer, stop_reason, final_loss, n_steps,
    optimised_probability ...), the edit metrics, those of the prompt behind a prefix as efficacy_prefixed and so on,
    and the provenance.
    """
    texts = list(texts)
    setting = _Setting(lm, method, context_templates, second_moment, store, hparams)
    study = setting.study("single_edits", {"texts": texts}, metrics=metrics)
    units = _units(requests)

    @cache
    def before() -> float:
        return measure.perplexity(lm, texts)

    def compute(some: Sequence[str]) -> Iterator[tuple[str, list[dict]]]:
        try:
            yield from together(some)
        except NbkitError:  # one request that cannot be used shall not keep the others from being done
            if len(some) > 1:
                for unit in some:
                    yield from together([unit])
            raise

    def together(some: Sequence[str]) -> Iterator[tuple[str, list[dict]]]:
        chosen = [units[unit] for unit in some]
        made = setting.edits(chosen)
        after = measure.perplexity(lm, texts, edits=made)
        measured: Sequence[dict] = [{}] * len(chosen)
        if metrics:
            measured = setting.metrics_of_each(chosen, made, measure.neighborhood_tokens(lm, chosen))
        for unit, request, done, value, row in zip(some, chosen, made, after, measured, strict=True):
            about = {**_described(lm, request), "perplexity": value, "perplexity_before": before()}
            yield unit, [{**about, **_outcome(done), **row}]

    return study.complete_together(
        [digest(request) for request in requests], compute, EDITS_AT_ONCE, f"{method}, single edits"
    )


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
    if evaluate_every < 1:
        raise ValueError(f"evaluate_every must be 1 or more, not {evaluate_every}")
    requests, texts = list(requests), list(texts)
    setting = _Setting(lm, method, context_templates, second_moment, store, hparams)
    data = {"texts": texts, "requests": requests}
    study = setting.study("sequential_edits", data, evaluate_every=evaluate_every)

    @cache
    def reference() -> dict:
        return measure.neighborhood_tokens(lm, requests)

    def compute(unit: str) -> Iterator[dict]:
        seed = int(unit)
        order = [requests[i] for i in np.random.default_rng(seed).permutation(len(requests))]
        unedited = reference()
        yield {"seed": seed, "n_edits": 0, "checkpoint": True, "perplexity": measure.perplexity(lm, texts)}
        right_after = []
        # Closed by hand: a traceback kept by a notebook would keep the generator, and the edits in the weights, alive.
        with closing(edit_sequence(lm, order, **setting.arguments)) as steps:
            for step in steps:
                done, checkpoint = step.index + 1, (step.index + 1) % evaluate_every == 0
                last = setting.metrics_of(step.request, unedited)
                right_after.append(last)
                row = {"seed": seed, "n_edits": done, "checkpoint": checkpoint or done == len(order)}
                row |= {**_described(lm, step.request), **_outcome(step.edit)}
                row |= {f"{name}_last": value for name, value in last.items()}
                row |= {f"{name}_after": value for name, value in pd.DataFrame(right_after).mean().items()}
                row |= dict.fromkeys(["perplexity", *last], np.nan)
                if row["checkpoint"]:
                    row["perplexity"] = measure.perplexity(lm, texts)
                    so_far = measure.edit_metrics(lm, order[:done], unedited)
                    row |= so_far[list(last)].mean().to_dict()
                yield row

    label = f"{method}, sequences" + (f" of {group} requests" if group else "")
    frame = study.complete([str(seed) for seed in seeds], compute, label, steps=len(requests) + 1)
    frame.insert(0, "group", group)  # a name, which determines no number, and so is not stored
    return frame


def task_correlation(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    task_names: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str | None = tasks.TASKS,
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
    setting = _Setting(lm, method, context_templates, second_moment, store, hparams)
    texts, names = list(texts), None if task_names is None else list(task_names)
    data = {"texts": texts, "tasks": None if include_path is None else files_digest(Path(include_path))}
    study = setting.study("task_correlation", data, tasks=names, limit=limit)
    units = _units(requests)

    def scored(about: dict) -> list[dict]:
        scores = tasks.task_scores(lm, names, limit=limit, include_path=include_path)
        about = {**about, "perplexity": measure.perplexity(lm, texts)}
        return [{**about, **row} for row in scores.to_dict("records")]

    def compute(unit: str) -> list[dict]:
        if unit == "unedited":
            return scored({"edited": False})
        (made,) = setting.edits([units[unit]])
        with applied(lm, made):
            return scored({"edited": True, **_described(lm, units[unit]), **_outcome(made)})

    return study.complete(["unedited", *(digest(request) for request in requests)], compute, f"{method}, task scores")


def spread(perplexity: Sequence[float], n: int) -> list[int]:
    """Places of `n` models whose perplexities lie as evenly as can be on a log scale, from the least to the largest.

    Infinite and NaN perplexities count as the largest finite one. All places, in order, if there are no more than n.
    """
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
