"""How edits have changed the weights, entry by entry: the statistics that RECT's authors show of a sequence.

    first = None
    for step in nbkit.edit_sequence(lm, requests, method="rome"):
        found = nbkit.delta_statistics(lm, first.thresholds if first else None)
        first = first or found                          # thresholds of the first edit: its top 20 % and 10 %
        print(step.index, found.manhattan, found.shares)

Source: Gu et al., Model Editing Harms General Abilities of Large Language Models, arXiv 2401.04700, whose GPT-2 XL
(one weight, by ROME) has the thresholds 0.077 and 0.171.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nbkit.edits.door import verb
from nbkit.edits.editable import EditableModel
from nbkit.edits.overlays import unedited
from nbkit.edits.selection import relative_change
from nbkit.errors import MethodError, ModelError
from nbkit.records.bounds import check_number, shown

TOP = (0.2, 0.1)  # the shares of the first edit's entries that lie above the thresholds


@dataclass(frozen=True)
class DeltaStatistics:
    """ΔW = W - W₀ over all weights that the edits in the model change, W₀ being the unedited model's.

    manhattan: ‖ΔW‖₁, the sum of |ΔW|. shares: of all entries, those with δ = |ΔW / W₀| above each of the thresholds,
    where ΔW = 0 is 0, and any other change of W₀ = 0 is infinite.
    """

    manhattan: float
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]


@verb
def delta_statistics(lm: EditableModel, thresholds: Sequence[float] | None = None) -> DeltaStatistics:
    """The statistics of the model as it is beside the unedited one, which is unchanged; all 0 where it carries no edit.

    thresholds: of δ. None: those above which 20 % and 10 % of the entries lie now (fewer, where more are alike); taken
    after the first edit and handed on, they are the paper's. Read off the weights, as they are rounded; holds a float64
    of each entry of the edited weights. MethodError for a threshold that is no number from 0 on; ModelError for None
    without an edit.
    """
    if thresholds is not None:
        if isinstance(thresholds, str) or not isinstance(thresholds, Sequence):
            raise MethodError(f"thresholds must be a list of numbers, not {shown(thresholds)}")
        for place, threshold in enumerate(thresholds):
            check_number(f"thresholds[{place}]", threshold, least=0, most=math.inf)
    now = {name: lm.oriented(name).detach().to(torch.float64, copy=True) for name in lm.unedited_weights}
    if not now and thresholds is None:
        raise ModelError(
            f"{lm.name} carries no edit, whose changes could give thresholds; apply one, or give thresholds"
        )
    if not now:
        return DeltaStatistics(0.0, tuple(map(float, thresholds)), (0.0,) * len(thresholds))
    ratios, manhattan = [], 0.0
    with unedited(lm):
        for name, weight in now.items():
            original = lm.oriented(name).detach().double()
            change = weight - original
            manhattan += float(change.abs().sum())
            ratios.append(relative_change(change, original).reshape(-1))
    delta = torch.cat(ratios)
    if thresholds is None:
        thresholds = [float(delta.kthvalue(max(len(delta) - round(share * len(delta)), 1)).values) for share in TOP]
    shares = tuple(float((delta > threshold).double().mean()) for threshold in thresholds)
    return DeltaStatistics(manhattan, tuple(map(float, thresholds)), shares)
