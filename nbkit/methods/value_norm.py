"""The norm that optimised values have in the unedited model: what NAS (anchoring.py) brings those of a sequence to.

    m = mean_value_norm(lm, requests, "alphaedit")                   # once a model, method and layer
    for step in nbkit.edit_sequence(lm, others, "alphaedit", value_norm=m):
        ...
"""

from collections.abc import Sequence
from typing import Any

import torch

from nbkit.edits.door import verb
from nbkit.edits.overlays import unedited
from nbkit.errors import MethodError
from nbkit.keys.solving import SecondMoments
from nbkit.methods.anchoring import values_to_anchor
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.method import MethodSettings
from nbkit.methods.values import ValueParameters, value_job, values_in_batches
from nbkit.methods.verbs import as_templates
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import in_order
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest

DROPPED = 0.05  # share of the norms, the largest


@verb
def mean_value_norm(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "memit",
    context_templates: Sequence[str] | None = ("{}",),
    progress: bool = True,
    **hparams: Any,
) -> float:
    """m = mean ‖v*‖ over requests, each optimised by itself in the unedited model; the largest 5 % are left out.

    The published m is of a thousand facts of CounterFact, at their plain prompts alone, by MEMIT's search whatever the
    method; here by the method's own, at its layer or the last of them. Other facts than those to be edited will do.
    hparams: of the method; a value_norm among them has no part in this. MethodError for a method that searches for no
    value, for no requests, and where a search ends in no number.
    """
    requests = as_requests(requests)
    if not requests:
        raise MethodError("the mean norm of values needs at least one request")
    with unedited(lm):
        parameters = hyper_parameters(lm, method, **hparams)
        if not isinstance(parameters, ValueParameters):
            raise MethodError(f"{method} searches for no value, so it has no mean norm of values")
        templates = as_templates(lm, context_templates, method)
        with_bar, layer = progress and len(requests) > 1, max(parameters.layers)
        settings = MethodSettings(method, parameters, templates, SecondMoments(None, lm), with_bar)
        jobs = [value_job(lm, request, templates) for request in requests]
        batches = values_in_batches(lm, jobs, settings, layer, parameters.site, f"{lm.title}: {method}, values")
        found = in_order((places, optimised) for places, _, optimised in batches)
        values = values_to_anchor(lm, requests, found, parameters)
    if lost := sum(one.stop_reason == "nan" for one in found):
        raise MethodError(f"the search for a value ends in no number for {lost} of {len(found)} requests")
    norms = torch.stack([(value + one.delta).norm().double() for value, one in zip(values, found, strict=True)])
    return norms.sort().values[: len(norms) - int(DROPPED * len(norms))].mean().item()
