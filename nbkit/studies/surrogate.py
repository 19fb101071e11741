"""Perplexity as a surrogate: perplexity of many damaged models, and what those that are chosen still do on tasks.

    made = {}                                                     # edits, shared by both
    rows = treated_perplexity(lm, treatments, texts, made=made)   # of the pool: cheap
    chosen = selection.stratified(rows, n=24)                     # nbkit/records/selection.py
    scores = treated_scores(lm, [treatments[place] for place in chosen], made=made)

Rows are stored treatment by treatment, named by all that determines the edit: one more treatment computes only itself.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import applied
from nbkit.models.language_model import LanguageModel
from nbkit.records.lists import as_texts
from nbkit.records.provenance import canonical, code_version, digest, provenance
from nbkit.records.results import Store, Study
from nbkit.studies import metrics as measure
from nbkit.studies import task_scores as tasks
from nbkit.studies.method_study import MethodStudy
from nbkit.studies.task_columns import tasks_data
from nbkit.studies.treatments import Treatment, check_treatments, edits_of, named

EDITS_AT_ONCE = 32  # treatments whose edits are made, measured and stored together
UNEDITED = "unedited"


@verb
def treated_perplexity(
    lm: LanguageModel,
    treatments: Sequence[Treatment],
    texts: Sequence[str],
    store: Store | None = None,
    made: MutableMapping[str, Edit] | None = None,
) -> pd.DataFrame:
    """Perplexity ("sentence_mean") of `texts` after each treatment of the unedited model: one row each, in order.

    made: edits by `Treatment.key` that are taken from there and put there, to be shared between studies. The model is
    unchanged afterwards.

    Columns: source, draw (see `Treatment.draw`), way, method, n_edits, regulariser, setting (in words), update_norm,
    perplexity, perplexity_before, and the provenance. MethodError, which names the source, for a treatment that cannot
    be made.
    """
    treatments, texts = check_treatments(treatments), as_texts(texts)
    study, by_unit, units = _study(lm, "treated_perplexity", treatments, store, {"texts": texts})
    made = {} if made is None else made

    @cache
    def before() -> float:
        return measure.perplexity(lm, texts, progress=False)

    def compute(some: Sequence[str]) -> Iterator[list[tuple[str, list[dict]]]]:
        chosen = [by_unit[unit] for unit in some]
        edits = edits_of(lm, chosen, made)
        after = measure.perplexity(lm, texts, edits=edits)
        yield [
            (unit, [{**_about(one, edit), "perplexity": value, "perplexity_before": before()}])
            for unit, one, edit, value in zip(some, chosen, edits, after, strict=True)
        ]

    frame = study.complete_together(units, compute, EDITS_AT_ONCE, f"{lm.title}: perplexity of treated models", "model")
    return _with_names(frame, treatments, range(len(treatments)))


@verb
def treated_scores(
    lm: LanguageModel,
    treatments: Sequence[Treatment],
    task_names: Sequence[str] | None = None,
    limit: int | None = None,
    include_path: Path | str = tasks.TASKS,
    store: Store | None = None,
    made: MutableMapping[str, Edit] | None = None,
    all_metrics: bool = False,
) -> pd.DataFrame:
    """Task scores of the unedited model and after each treatment of it: one row per model and task.

    task_names, limit, include_path, all_metrics: as in `tasks.task_scores`; `ability.retained` takes rows of one metric
    a task. made: as in `treated_perplexity`.

    Columns: edited (False for the unedited model, first), place (of the treatment in the list, -1 for the unedited
    model), source and the others of `treated_perplexity` but the perplexities, task, kind, metric, score, stderr,
    chance, choice, n (items scored), and the provenance.
    """
    treatments = check_treatments(treatments)
    tasks.check_tasks(task_names, limit, include_path)
    names = None if task_names is None else list(task_names)
    data = tasks_data(names, include_path)
    asked_for = {"tasks": names, "limit": limit, "all_metrics": all_metrics}
    study, by_unit, units = _study(lm, "treated_scores", treatments, store, data, **asked_for)
    made = {} if made is None else made

    def scored(about: dict) -> list[dict]:
        rows = tasks.task_scores(lm, names, limit=limit, include_path=include_path, all_metrics=all_metrics)
        return [{**about, **row} for row in rows.to_dict("records")]

    def compute(unit: str) -> list[dict]:
        if unit == UNEDITED:
            return scored({"edited": False})
        one = by_unit[unit]
        if one.key not in made:
            start = units.index(unit)
            edits_of(lm, [by_unit[u] for u in units[start : start + EDITS_AT_ONCE] if not study.done(u)], made)
        with named(one), applied(lm, made[one.key]):
            return scored({"edited": True, **_about(one, made[one.key])})

    asked = [UNEDITED, *units]
    frame = study.complete(asked, compute, f"{lm.title}: task scores of treated models", each="model")
    n_tasks = [len(study.frame([unit])) for unit in asked]
    places = [place - 1 for place, n in enumerate(n_tasks) for _ in range(n)]
    return _with_names(frame, treatments, places)


def _study(
    lm: LanguageModel, name: str, treatments: Sequence[Treatment], store: Store | None, data: dict, **parameters: Any
) -> tuple[Study, dict[str, Treatment], list[str]]:
    """The stored study, and its units: named by the treatment, and by the method's parameters where it has one."""

    @cache
    def determined(method: str, settings: "_Settings") -> dict:
        given = dict(settings.values)
        moments = given.pop("second_moment", None)
        return MethodStudy(lm, method, given.pop("context_templates", None), moments, store, given).parameters

    units = []
    for one in treatments:
        with named(one):
            units.append(digest([one.key, determined(one.method, _Settings(one.settings)) if one.method else None]))
    hashes = {what: digest(value) for what, value in data.items()}
    key = {"model": lm.hash, "dtype": str(lm.dtype), "code": code_version(), "unedited": lm.base_hash}
    key |= {"data": hashes, "parameters": parameters}
    store = Store() if store is None else store
    study = store.study(name, key, provenance(lm, data_hash=hashes, parameters=parameters))
    return study, dict(zip(units, treatments, strict=True)), units


class _Settings:
    """Arguments of `nbkit.edit` by their content, as a cache needs them."""

    def __init__(self, values):
        self.values, self.content = values, canonical(dict(values))

    def __eq__(self, other):
        return self.content == other.content

    def __hash__(self):
        return hash(self.content)


def _about(one: Treatment, edit: Edit) -> dict[str, Any]:
    layers = one.settings.get("layer", one.settings.get("layers"))
    strength = {**one.arguments, **({} if one.relative_norm is None else {"relative_norm": one.relative_norm})}
    words = [f"layer {layers}".replace("[", "").replace("]", "")] if layers is not None else []
    words += [f"{len(one.requests)} edits"] if len(one.requests) > 1 else []
    words += [f"{name.replace('_', ' ')} {value:.3g}" for name, value in strength.items() if isinstance(value, float)]
    return {
        "way": one.way, "method": one.method, "n_edits": len(one.requests), "regulariser": one.regulariser,
        "setting": ", ".join(words), "update_norm": edit.norm(),
    }  # fmt: skip


def _with_names(frame: pd.DataFrame, treatments: Sequence[Treatment], places: Sequence[int]) -> pd.DataFrame:
    """The rows with names for people, which determine no number and so are not stored."""
    of = [treatments[place] if place >= 0 else None for place in places]
    frame.insert(0, "draw", [None if one is None else one.draw for one in of])
    frame.insert(0, "source", [UNEDITED if one is None else one.source for one in of])
    frame.insert(0, "place", list(places))
    return frame
