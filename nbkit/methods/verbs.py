"""The methods by name, and the three verbs that run them, which are never the same thing:

    edits = edit(lm, requests, method="rome", key_mode="prefixed")      # independent: one Edit each, of the same model
    one = edit_batch(lm, requests, method="memit")                      # a batch: ONE Edit that carries all requests
    for step in edit_sequence(lm, requests, method="memit", per_step=10):
        ...                                                             # in sequence: lm carries all edits so far

`edit` and `edit_batch` leave the model unchanged, `edit_sequence` gives the weights back as they were.
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import restoring
from nbkit.errors import MethodError, RequestError
from nbkit.keys.moments import SecondMoments, default_second_moments
from nbkit.methods.finetune import FinetuneParameters, finetune_each, finetune_together
from nbkit.methods.knowledge_neurons import KnowledgeNeuronParameters, knowledge_neurons_each
from nbkit.methods.memit import MemitParameters, memit_each, memit_together
from nbkit.methods.mend import MendParameters, mend_each, mend_files, mend_together
from nbkit.methods.method import MEMIT_TEMPLATES, ROME_TEMPLATES, Method, Setting
from nbkit.methods.rome import RomeParameters, rome
from nbkit.models import prompts
from nbkit.models.language_model import LanguageModel
from nbkit.records.requests import EditRequest

HPARAMS = Path(__file__).parent / "hparams.toml"
SecondMomentLike = Tensor | np.ndarray | Mapping[int, Tensor] | SecondMoments | None

METHODS: dict[str, Method] = {
    "ft": Method(FinetuneParameters, finetune_each, finetune_together),
    "kn": Method(KnowledgeNeuronParameters, knowledge_neurons_each),
    "mend": Method(MendParameters, mend_each, mend_together, files=mend_files),
    "rome": Method(RomeParameters, rome, template_lengths=ROME_TEMPLATES),
    **{
        name: Method(MemitParameters, memit_each, memit_together, True, MEMIT_TEMPLATES)
        for name in ("memit", "emmet", "alphaedit")
    },
}


@dataclass(frozen=True)
class Step:
    """One edit of a sequence; while it is in the caller's hands the model carries this and all earlier edits."""

    index: int  # from 0
    requests: tuple[EditRequest, ...]
    edit: Edit

    @property
    def request(self) -> EditRequest:
        """The request of a step that has exactly one."""
        (request,) = self.requests
        return request


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

    Many are computed side by side where the method can, and do not see each other: batch_size at once, or as many as
    memory takes.

    context_templates: the first must be "{}"; None samples the method's own from the model with seed 0.
    second_moment: E[k kᵀ], one matrix or {layer: matrix}, or a SecondMoments, whose factors then serve many calls.
    None: ROME takes the identity; a method that cannot do without has it computed from the model's default text once,
    and cached (`moments.default_second_moments`). hparams override hparams.toml. progress: a bar, when there is more
    than one request. MethodError for an unknown method or hyper-parameter.
    """
    requests = _as_list(requests)
    setting = _setting(lm, method, context_templates, second_moment, progress and len(requests) > 1, hparams)
    return METHODS[method].each(lm, requests, dataclasses.replace(setting, batch_size=batch_size))


def edit_batch(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "memit",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    **hparams: Any,
) -> Edit:
    """ONE edit that carries all requests; the model is unchanged afterwards. Arguments as in `edit`.

    MethodError for a method that makes one edit of one request, as ROME does, and for no requests.
    """
    requests = _as_list(requests)
    together = _together(method)
    if not requests:
        raise MethodError("a batch needs at least one request")
    setting = _setting(lm, method, context_templates, second_moment, progress and len(requests) > 1, hparams)
    return together(lm, requests, setting)


def edit_sequence(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    per_step: int = 1,
    **hparams: Any,
) -> Iterator[Step]:
    """Edit by edit, each computed on the already edited model; arguments as in `edit`, checked at once.

    per_step: how many requests each edit of the sequence carries; more than one is for methods that make batches. The
    last step has those that are left.

    Between two steps the model carries all edits so far. When the loop ends, breaks off or raises, the weights are
    restored bit for bit (if the iterator was kept under a name: once it is closed). Context templates and second
    moment are those of the unedited model throughout.
    """
    requests = _as_list(requests)
    if isinstance(per_step, bool) or not isinstance(per_step, int) or per_step < 1:
        raise MethodError(f"per_step must be a whole number from 1 on, not {per_step!r}")
    together = None if per_step == 1 else _together(method)
    setting = _setting(lm, method, context_templates, second_moment, False, hparams)
    chunks = [tuple(requests[start : start + per_step]) for start in range(0, len(requests), per_step)]

    def steps() -> Iterator[Step]:
        earlier: list[Edit] = []
        with restoring(lm) as add:
            bar = tqdm(chunks, desc=f"{method}, in sequence", unit="edit", disable=not progress or len(chunks) < 2)
            for index, chunk in enumerate(bar):
                here = dataclasses.replace(setting, earlier=tuple(earlier))
                new = together(lm, chunk, here) if together else METHODS[method].each(lm, chunk, here)[0]
                add(new)
                earlier.append(new)
                yield Step(index, chunk, new)

    return steps()


def _setting(
    lm: LanguageModel,
    method: str,
    context_templates: Sequence[str] | None,
    second_moment: SecondMomentLike,
    progress: bool,
    hparams: Mapping[str, Any],
) -> Setting:
    parameters = hyper_parameters(lm, method, **hparams)
    templates = as_templates(lm, context_templates, method)
    moments = as_moments(lm, needed_moments(lm, method, parameters, second_moment))
    return Setting(parameters, templates, moments, progress, method=method)


def _together(method: str):
    """The function of a method that makes one edit of many requests; MethodError for another's."""
    _check(method)
    together = METHODS[method].together
    if together is None:
        can = ", ".join(name for name, known in METHODS.items() if known.together)
        raise MethodError(
            f"{method} makes one edit of one request, not of a batch; use edit or edit_sequence, or one of {can}"
        )
    return together


def _check(method: str) -> None:
    if method not in METHODS:
        raise MethodError(f"unknown method {method!r}; known: {', '.join(METHODS)}")


def hyper_parameters(lm: LanguageModel, method: str, **hparams: Any) -> Any:
    """The method's parameters for this model: given ones over the family's over the method's own. MethodError if one is
    unknown, missing or of the wrong type; ModelError for a layer that does not exist."""
    _check(method)
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
    parameters = kind(**values)
    for layer in values.get("layers", [values["layer"]] if "layer" in values else []):
        lm.check_layer(layer)
    return parameters


def _defaults(lm: LanguageModel, method: str) -> dict[str, Any]:
    table = tomllib.loads(HPARAMS.read_text(encoding="utf-8"))[method]
    values = {name: value for name, value in table.items() if not isinstance(value, dict)}
    model = lm.name.rstrip("/").split("/")[-1].lower()
    families = [name for name, value in table.items() if isinstance(value, dict) and name in model]
    values |= table[max(families, key=len)] if families else {}
    return {name: value for name, value in values.items() if name != "source"}


def _typed(value: Any, kind: type, name: str) -> Any:
    """`value` as `kind`; an int will do for a float, a list for a tuple of ints, nothing else is converted."""
    if get_origin(kind) is tuple:
        if not isinstance(value, Sequence) or not all(type(item) is int for item in value):
            raise MethodError(f"{name} must be a list of whole numbers, not {value!r}")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        raise MethodError(f"{name} must be {kind.__name__}, not {value!r}")
    return value


def as_templates(lm: LanguageModel, templates: Sequence[str] | None, method: str = "rome") -> list[str]:
    """The templates given, or else those of the method, sampled with seed 0."""
    if templates is None:
        return prompts.context_templates(lm, seed=0, lengths=METHODS[method].template_lengths)
    return prompts.check_templates(templates)


def needed_moments(lm: LanguageModel, method: str, parameters: Any, given: SecondMomentLike) -> SecondMomentLike:
    """What is given; if that is None and the method cannot do without, those of the model's default text."""
    if given is None and METHODS[method].needs_second_moment:
        return default_second_moments(lm, parameters.layers)
    return given


def as_moments(lm: LanguageModel, given: SecondMomentLike) -> SecondMoments:
    return given if isinstance(given, SecondMoments) else SecondMoments(given, lm)


def _as_list(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    requests = [requests] if isinstance(requests, EditRequest) else list(requests)
    for index, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise RequestError(f"request {index} is no EditRequest but {type(request).__name__}: {request!r:.80}")
    return requests
