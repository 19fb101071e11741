"""NAS, norm-anchored scaling: v* is brought to the norm that such values have in the unedited model.

    v* = v + δ  becomes  v*' = v* m / ‖v*‖,  and v where ‖v*‖ > 2 m

v is what the projection says at the plain prompt, δ the search's, m the hyper-parameter `value_norm`, which
`mean_value_norm` measures; any method that searches for a value takes it. The paper's reason: edited weights make the
values that are found larger, and these the weights, so that norms grow exponentially in a sequence. MEMIT and its
relatives search for z = z₀ + δ in the residual stream: there v is what the projection of the last layer says, and
z = z₀ - v + v*'. Where a norm follows the projection (Gemma's), v and δ are not of one scale, and this is rougher.

Liu et al., Norm Anchors Make Model Edits Last (arXiv 2602.02543), and its code, SasyaTitech/NAS. In the code ROME's
values are given up above 5 m, under a message that says 2; here the bound is 2 for all.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nbkit.keys.extract import keys_in_contexts
from nbkit.methods.values import OptimisedValue, ValueParameters
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import in_order
from nbkit.records.requests import EditRequest

TOO_LARGE = 2.0  # times m


def anchored(
    lm: LanguageModel, requests: Sequence[EditRequest], found: Sequence[OptimisedValue], parameters: ValueParameters
) -> list[OptimisedValue]:
    """What was found for each request, with the δ of v*' - v; as it is where `value_norm` is 0.

    Losses and the target's probability stay those of the search.
    """
    norm, scaled = parameters.value_norm, []
    if not norm:
        return list(found)
    for one, value in zip(found, values_to_anchor(lm, requests, found, parameters), strict=True):
        star = value + one.delta
        length = star.norm()
        delta = torch.where(length > TOO_LARGE * norm, 0.0, star * (norm / length) - value)
        scaled.append(replace(one, delta=delta))
    return scaled


def values_to_anchor(
    lm: LanguageModel, requests: Sequence[EditRequest], found: Sequence[OptimisedValue], parameters: ValueParameters
) -> list[Tensor]:
    """v of each request, (d_model): what its search started from, or what the projection below it says."""
    if parameters.site == "projection":
        return [one.value_init for one in found]
    batches = keys_in_contexts(lm, requests, max(parameters.layers), ["{}"], progress=False)
    return in_order((places, states.values[:, 0]) for places, states in batches)
