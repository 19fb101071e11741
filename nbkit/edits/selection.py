"""Regularisers that keep some entries of an update and make the others 0.

    regularise(edit, lm, "rect", keep=0.4)              # RECT: the 40 % largest changes relative to the weight
    regularise(edit, lm, "random", keep=0.4, seed=0)    # its control: any 40 %

Source: Gu et al., Model Editing Harms General Abilities of Large Language Models, arXiv 2401.04700.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.updates import Deltas, Dense
from nbkit.records.bounds import check_number


def rect(edit: Edit, lm: EditableModel, *, keep: float) -> tuple[Deltas, dict]:
    """RECT: of each weight, the round(keep · size) entries with the largest δ = |ΔW / W|; all others become 0.

    W is the weight in lm, which in a sequence carries the earlier edits, as in RECT. Where W = 0, δ is infinite, or 0
    if ΔW = 0 too; where it would be NaN, infinite. Of equal δ those are kept that come first in (d_out, d_in), row by
    row.
    """
    check_number("keep", keep, above=0, most=1)
    deltas = {}
    for name, delta in edit.deltas.items():
        update = delta.to(lm.device).dense()
        change = update.double().abs()
        ratio = (change / lm.oriented(name).double().abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        relative = torch.where(change == 0, 0.0, ratio).reshape(-1)
        deltas[name] = _only(update, largest(relative, round(keep * update.numel())))
    return deltas, {}


def random(edit: Edit, lm: EditableModel, *, keep: float, seed: int) -> tuple[Deltas, dict]:
    """Of each weight, round(keep · size) entries drawn at random; all others become 0. The baseline of RECT.

    The same seed draws the same entries for every edit of the same weights, on every device.
    """
    check_number("keep", keep, above=0, most=1)
    check_number("seed", seed, least=0, below=2**64, whole=True)
    generator = torch.Generator().manual_seed(int(seed))
    deltas = {}
    for name, delta in edit.deltas.items():
        update = delta.dense()
        kept = torch.zeros(update.numel(), dtype=torch.bool)
        kept[torch.randperm(update.numel(), generator=generator)[: round(keep * update.numel())]] = True
        deltas[name] = _only(update, kept)
    return deltas, {}


def _only(update: Float[Tensor, "d_out d_in"], kept: Bool[Tensor, " n"]) -> Dense:
    """The update's entries that are kept, counted row by row; all others 0."""
    return Dense(torch.where(kept.view(update.shape).to(update.device), update, 0))


def largest(scores: Float[Tensor, " n"], n: int) -> Bool[Tensor, " n"]:
    """Where the n largest are; of equal ones the first."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - n + 1).values
    above, tied = scores > threshold, scores == threshold
    return above | (tied & (tied.cumsum(0) <= n - above.sum()))
