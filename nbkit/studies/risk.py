"""How dangerous a ROME edit will be, from keys alone: no search for v*, one short pass up to the edited layer.

    frame = collapse_risk(lm, requests)          # one row a request; sort by "risk"

An edit's update has the norm ‖v* - W k‖ / |k·u|. The denominator depends on keys only, and the numerator cannot exceed
what the clamp of the search allows, so both the denominator and a bound on ‖ΔW‖ are known beforehand. A tiny
denominator is what *The Fall of ROME* (Yang et al.) found behind the collapse.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from nbkit.edits.door import verb
from nbkit.keys.extract import keys_in_contexts
from nbkit.methods.rome import update_direction
from nbkit.methods.values import initial_value
from nbkit.methods.verbs import SecondMomentLike, settings_for
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import request_columns, with_plain
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest

MEASURED = ["denominator", "signed_denominator", "value_norm", "update_norm_bound", "risk"]


@verb
def collapse_risk(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    layer: int | None = None,
    key_mode: str = "mixed",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    **hparams: Any,
) -> pd.DataFrame:
    """What ROME's update of every request will be divided by, and how large that update can be at most.

    layer: None takes the model's own from hparams.toml. The other arguments as in `nbkit.edit`, hparams too (such as
    second_moment_ridge); they must be those of the edits that the risk is about. The model is not changed.

    Columns: case_id (as text), subject, subject_kind, layer, key_mode, denominator |k·u| and signed_denominator k·u
    (those of `edit.info`), value_norm (‖value_init‖), update_norm_bound (‖ΔW‖_F will not exceed it: (clamp_norm_factor
    ‖value_init‖ + ‖value_init - (W k + b)‖) / denominator), and risk, that bound over ‖W‖_F.
    """
    requests = as_requests(requests)
    given = {"layer": layer, "key_mode": key_mode, **hparams}
    settings = settings_for(lm, "rome", context_templates, second_moment, given)
    parameters = settings.parameters
    weight_norm = lm.weight(parameters.layer).double().norm()
    numbers = torch.empty(len(requests), len(MEASURED), dtype=torch.float64)
    templates, n_templates = with_plain(settings.context_templates), len(settings.context_templates)
    for places, of_batch in keys_in_contexts(lm, requests, parameters.layer, templates, progress):
        key, value_now, u = update_direction(of_batch, settings.second_moments, parameters, n_templates)
        value_init = initial_value(of_batch.values, parameters, n_templates)
        divisor = (key.double() * u).sum(-1)
        norm = value_init.double().norm(dim=-1)
        largest = parameters.clamp_norm_factor * norm + (value_init - value_now).double().norm(dim=-1)
        bound = largest / divisor.abs()
        numbers[places] = torch.stack([divisor.abs(), divisor, norm, bound, bound / weight_norm], 1).cpu()
    here = {"layer": parameters.layer, "key_mode": parameters.key_mode}
    about = [{**request_columns(lm, request), **here} for request in requests]
    measured = pd.DataFrame(numbers.numpy(), columns=MEASURED)
    return pd.concat([pd.DataFrame(about), measured], axis=1)


def risk_in_words(risk: float, risks: Sequence[float]) -> str:
    """Where one risk lies among those of other requests, its own among them or not: "higher than 93 % of the 900".

    The share is that of the risks that are lower, in whole per cent and rounded down, so that only what exceeds all is
    said to.
    """
    others = np.asarray(risks, float)
    n, below = len(others), int((others < risk).sum())
    if np.isnan(risk) or not n:
        return "not to be compared: it is NaN" if np.isnan(risk) else "not to be compared: there is no other request"
    if below == n:
        return f"higher than that of all {n} requests"
    if not (others > risk).any():
        return f"the highest of the {n} requests"
    if not below:
        return f"the lowest of the {n} requests" if risk in others else f"lower than that of all {n} requests"
    return f"higher than {100 * below // n} % of the {n} requests"
