"""How far the weights have gone from the unedited model's, whatever edits brought them there.

    with applied(lm, edit):
        drift(lm, second_moment=C)           # Drift(norm=..., felt=..., felt_relative=...)

Read off the weights, not off the edits: updates of a sequence partly undo each other, and each is rounded to the
weights' number type.
"""

import math
from dataclasses import dataclass

import torch

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import unedited
from nbkit.edits.updates import Dense
from nbkit.keys.felt import felt_of, projections
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.models.language_model import LanguageModel


@dataclass(frozen=True)
class Drift:
    """ΔW = W - W₀ of all weights that the edits in the model change, W₀ being the unedited model's.

    norm: ‖ΔW‖_F over all of them. felt, felt_relative: √E‖ΔW k‖² and that over √E‖W₀ k‖², over those that are MLP
    projections, as in `Felt` but beside the unedited outputs; NaN without second moments, and where none is.
    """

    norm: float
    felt: float
    felt_relative: float


@verb
def drift(lm: LanguageModel, second_moment: SecondMomentLike = None) -> Drift:
    """How far the model as it is lies from the unedited one; all 0 where it carries no edit. The model is unchanged.

    second_moment: E[k kᵀ] of ordinary text, as in `nbkit.edit`; without it what text feels is NaN. Costs a product of
    two matrices for each changed weight, in float64, and a copy of each. What is NaN or infinite in a weight makes all
    three so.
    """
    now = {name: lm.oriented(name).detach().to(torch.float64, copy=True) for name in lm.unedited_weights}
    if not now:
        return Drift(0.0, 0.0, 0.0)
    with unedited(lm):
        change = Edit({name: Dense(weight - lm.oriented(name).double()) for name, weight in now.items()})
        if second_moment is None:
            return Drift(change.norm(), math.nan, math.nan)
        found = felt_of(lm, [change], SecondMoments.of(second_moment, lm))[0] if projections(lm, [change]) else None
    return Drift(change.norm(), *((found.absolute, found.relative) if found else (math.nan, math.nan)))


def drifted_layers(lm: LanguageModel) -> tuple[int, ...]:
    """The layers whose MLP projection carries edits."""
    named = {lm.weight_name(layer): layer for layer in range(lm.n_layers)}
    return tuple(sorted(named[name] for name in lm.unedited_weights if name in named))
