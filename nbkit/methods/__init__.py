"""The methods by name, and the verbs that run them: independent edits, and edits on top of each other.

What they have in common, whatever the method:

    edits = edit(lm, requests, method="rome", key_mode="prefixed")
    for step in edit_sequence(lm, requests): ...      # inside the loop, lm carries all edits so far

`edit_sequence` gives the weights back as they were.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from nbkit import prompts
from nbkit.edits import Edit, restoring
from nbkit.errors import MethodError, RequestError
from nbkit.methods.rome import RomeParameters, rome
from nbkit.models import LanguageModel
from nbkit.moments import SecondMoments
from nbkit.requests import EditRequest

HPARAMS = Path(__file__).parent.parent / "hparams.toml"
SecondMomentLike = Tensor | np.ndarray | Mapping[int, Tensor] | SecondMoments | None


@dataclass(frozen=True)
class Method:
    """`run(lm, requests, context_templates, second_moments, parameters, progress, batch_size) -> list[Edit]`, and its
    settings."""

    run: Callable[..., list[Edit]]
    parameters: type


METHODS: dict[str, Method] = {"rome": Method(rome, RomeParameters)}


@dataclass(frozen=True)
class Step:
    """One edit of a sequence; while it is in the caller's hands the model carries this and all earlier edits."""

    index: int  # from 0
    request: EditRequest
    edit: Edit


def edit(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    batch_size: int | None = None,
    **hparams: Any,
) -> list[Edit]:
    """Independent edits of the model as it is, one Edit a request; the model is unchanged afterwards.

    Many are computed side by side and do not see each other: batch_size at once, or as many as memory takes.

    context_templates: the first must be "{}"; None samples them from the model with seed 0.
    second_moment: E[k kᵀ], one matrix or {layer: matrix}, or a SecondMoments, whose factors then serve many calls;
    None: ROME takes the identity. hparams override hparams.toml. progress: a bar, when there is more than one request.
    MethodError for an unknown method or hyper-parameter.
    """
    requests = _as_list(requests)
    parameters = hyper_parameters(lm, method, **hparams)
    templates = as_templates(lm, context_templates)
    moments = as_moments(lm, second_moment)
    return METHODS[method].run(lm, requests, templates, moments, parameters, progress and len(requests) > 1, batch_size)


def edit_sequence(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    **hparams: Any,
) -> Iterator[Step]:
    """Edit by edit, each computed on the already edited model; arguments as in `edit`, checked at once.

    Between two steps the model carries all edits so far. When the loop ends, breaks off or raises, the weights are
    restored bit for bit (if the iterator was kept under a name: once it is closed). Context templates and second
    moment are those of the unedited model throughout.
    """
    requests = _as_list(requests)
    parameters = hyper_parameters(lm, method, **hparams)
    templates = as_templates(lm, context_templates)
    moments = as_moments(lm, second_moment)

    def steps() -> Iterator[Step]:
        with restoring(lm) as add:
            bar = tqdm(requests, desc=f"{method}, in sequence", unit="edit", disable=not progress or len(requests) < 2)
            for index, request in enumerate(bar):
                (new,) = METHODS[method].run(lm, [request], templates, moments, parameters, False)
                add(new)
                yield Step(index, request, new)

    return steps()


def hyper_parameters(lm: LanguageModel, method: str, **hparams: Any) -> Any:
    """The method's parameters for this model: given ones over the family's over the method's own. MethodError if one is
    unknown, missing or of the wrong type; ModelError for a layer that does not exist."""
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    kind = METHODS[method].parameters
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(hparams) - set(fields))
    if unknown:
        raise MethodError(f"{method} has no hyper-parameter {', '.join(unknown)}; it has {', '.join(fields)}")
    values = {**_defaults(lm, method), **hparams}
    missing = [name for name in fields if name not in values]
    if missing:
        raise MethodError(f"{method} has no default {', '.join(missing)} for {lm.name}; give it, e.g. {missing[0]}=...")
    for name, field in fields.items():
        values[name] = _typed(values[name], field.type, f"{method}'s {name}")
    if "layer" in values:
        lm.check_layer(values["layer"])
    return kind(**values)


def _defaults(lm: LanguageModel, method: str) -> dict[str, Any]:
    table = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))[method]
    values = {name: value for name, value in table.items() if not isinstance(value, dict)}
    model = lm.name.rstrip("/").split("/")[-1].lower()
    families = [name for name, value in table.items() if isinstance(value, dict) and name in model]
    return {**values, **(table[max(families, key=len)] if families else {})}


def _typed(value: Any, kind: type, name: str) -> Any:
    """`value` as `kind`; an int will do for a float, nothing else is converted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise MethodError(f"{name} must be {kind.__name__}, not {value!r}")
    return value


def as_templates(lm: LanguageModel, templates: Sequence[str] | None) -> list[str]:
    return prompts.context_templates(lm, seed=0) if templates is None else prompts.check_templates(templates)


def as_moments(lm: LanguageModel, given: SecondMomentLike) -> SecondMoments:
    return given if isinstance(given, SecondMoments) else SecondMoments(given, lm)


def _as_list(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    requests = [requests] if isinstance(requests, EditRequest) else list(requests)
    for index, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise RequestError(f"request {index} is no EditRequest but {type(request).__name__}: {request!r:.80}")
    return requests
