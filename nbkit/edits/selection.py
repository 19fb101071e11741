"""Regularisers that keep some entries of an update and make the others 0.

    regularise(edit, lm, "rect", keep=0.4)              # RECT: the 40 % largest changes relative to the weight
    regularise(edit, lm, "select", keep=0.4, by="change")               # the 40 % largest changes
    regularise(edit, lm, "random", keep=0.4, seed=0)    # any 40 %

Source of RECT and of the random baseline: Gu et al., Model Editing Harms General Abilities of Large Language Models,
arXiv 2401.04700.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.inputs import moment_of
from nbkit.edits.updates import Deltas, Dense
from nbkit.errors import MethodError
from nbkit.records.bounds import check_choice, check_number, shown

SCORES = ("change", "relative", "felt")


def rect(edit: Edit, lm: EditableModel, *, keep: float) -> tuple[Deltas, dict]:
    """RECT: of each weight, the round(keep · size) entries with the largest δ = |ΔW / W|; all others become 0.

    W is the weight in lm, which in a sequence carries the earlier edits, as in RECT. Where W = 0, δ is infinite, or 0
    if ΔW = 0 too; where it would be NaN, infinite. Of equal δ those are kept that come first in (d_out, d_in), row by
    row.
    """
    return select(edit, lm, keep=keep, by="relative")


def select(
    edit: Edit,
    lm: EditableModel,
    *,
    keep: float,
    by: str = "change",
    second_moments: Mapping[str, Tensor] | None = None,
) -> tuple[Deltas, dict]:
    """Of each weight, the round(keep · size) entries with the largest score; all others become 0.

    by: "change", |ΔW|; "relative", |ΔW / W|, which is `rect`; "felt", |ΔW_ij| √E[k_j²], how far the entry alone moves
    its output on ordinary text, by the diagonal of second_moments (as in `inputs.moment_of`), which only that needs.
    Of equal scores the first are kept, as in `rect`; a score of NaN counts as infinite.
    """
    check_number("keep", keep, above=0, most=1)
    check_choice("by", by, SCORES)
    deltas = {}
    for name, delta in edit.deltas.items():
        update = delta.to(lm.device).dense()
        if by == "relative":
            score = relative_change(update, lm.oriented(name))
        else:
            score = update.double().abs()
        if by == "felt":
            score = score * moment_of(second_moments, name, lm).diagonal().sqrt()
        score = score.nan_to_num(nan=torch.inf, posinf=torch.inf).reshape(-1)
        deltas[name] = _only(update, largest(score, round(keep * update.numel())))
    return deltas, {}


def random(edit: Edit, lm: EditableModel, *, keep: float, seed: int, rescaled: bool = False) -> tuple[Deltas, dict]:
    """Of each weight, round(keep · size) entries drawn at random; all others become 0. The baseline of RECT.

    rescaled: what is kept is divided by the share that is kept, so that over seeds the mean of the update, and of its
    output on any key, is that of the whole one; without it the output is about `keep` times as large.
    The same seed draws the same entries for every edit of the same weights, on every device.
    """
    check_number("keep", keep, above=0, most=1)
    if not isinstance(rescaled, bool):
        raise MethodError(f"rescaled must be True or False, not {shown(rescaled)}")
    generator, deltas = seeded(seed), {}
    for name, delta in edit.deltas.items():
        update = delta.dense()
        n = round(keep * update.numel())
        kept = torch.zeros(update.numel(), dtype=torch.bool)
        kept[torch.randperm(update.numel(), generator=generator)[:n]] = True
        chosen = _only(update, kept)
        deltas[name] = chosen.scaled(update.numel() / n) if rescaled and n else chosen
    return deltas, {}


def relative_change(update: Float[Tensor, "*n"], weight: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """δ = |ΔW / W| entry by entry, in float64: 0 where ΔW = 0, infinite where only W = 0 and where it would be NaN."""
    change = update.double().abs()
    ratio = (change / weight.double().abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(change == 0, 0.0, ratio)


def seeded(seed: int) -> torch.Generator:
    """Of the CPU, so that the same seed draws the same on every device."""
    check_number("seed", seed, least=0, below=2**64, whole=True)
    return torch.Generator().manual_seed(int(seed))


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
