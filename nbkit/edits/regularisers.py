"""What makes an edit smaller or sparser after it was computed: Edit -> Edit, so each combines with every method.

    regularise(edit, lm, "rect", keep=0.4)              # RECT: the 40 % largest changes relative to the weight
    regularise(edit, lm, "random", keep=0.4, seed=0)    # its control: any 40 %
    regularise(edit, lm, "scale", like=other)           # its other control: shrunk to the same norm
    regularise(accumulated(edits), lm, "prune")         # PRUNE: of a whole sequence

All see an update in orientation (d_out, d_in), so a transposed architecture makes no difference. A bias is a weight of
one column to them.
Sources: Gu et al., Model Editing Harms General Abilities of Large Language Models (RECT, random, PCA); Ma et al.,
Perturbation-Restrained Sequential Model Editing, arXiv 2405.16821 (PRUNE).
"""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nbkit.edits.edit import Edit, as_edits
from nbkit.edits.editable import EditableModel
from nbkit.edits.updates import Dense, Update, total
from nbkit.errors import MethodError, ModelError
from nbkit.records.bounds import check_choice, check_number

Deltas = dict[str, Update]


def regularise(edit: Edit, lm: EditableModel, name: str, **arguments: Any) -> Edit:
    """The edit with its updates regularised by one of `REGULARISERS`; `arguments` are those of the function there.

    lm: the model as it is before this edit, so call it before the edit is applied. Requests, method and hparams stay.
    `info` keeps what the method measured of its own update, and gets the update_norm of the new one, "regulariser" (the
    name; "rect + scale" where one follows another), "regulariser_<argument>" for each argument, and
    "regulariser_norm_ratio", the new norm over the old. MethodError for an unknown name, argument or value, ModelError
    for an edit that does not fit lm.
    """
    if not isinstance(edit, Edit):
        raise MethodError(f"regularise takes one Edit, not a {type(edit).__name__}; nbkit.edit gives a list of them")
    if not isinstance(name, str) or name not in REGULARISERS:
        raise MethodError(f"unknown regulariser {name!r}; known: {', '.join(REGULARISERS)}")
    function = REGULARISERS[name]
    for weight, delta in edit.deltas.items():
        lm.weight_of(weight, delta)
    given = _arguments(name, function, arguments)
    deltas, measured = function(edit, lm, **given)
    before, new = edit.norm(), dataclasses.replace(edit, deltas=deltas)
    after, earlier = new.norm(), edit.info.get("regulariser")
    about = {argument: value for argument, value in given.items() if value is not None and not isinstance(value, Edit)}
    about |= {**measured, "norm_ratio": after / before if before else math.nan}
    info = {**edit.info, "regulariser": f"{earlier} + {name}" if earlier else name}
    info |= {f"regulariser_{argument}": value for argument, value in about.items()}
    return dataclasses.replace(new, info={**info, "update_norm": after})


def accumulated(edits: Sequence[Edit]) -> Edit:
    """One edit that does what all of them do: the sum of the updates of each weight, with the requests of all.

    Low-rank updates of a weight stay low-rank, of the sum of the ranks; with a dense one among them the sum is dense.
    method: theirs, joined by " + " where they differ. hparams: theirs if all have the same, else none. info: n_edits
    and update_norm. MethodError for no edits or for updates of different shapes.
    """
    edits = as_edits(edits)
    if not edits:
        raise MethodError("there are no edits to accumulate")
    names = dict.fromkeys(name for edit in edits for name in edit.deltas)
    same = all(dict(edit.hparams) == dict(edits[0].hparams) for edit in edits)
    added = Edit(
        {name: total([edit.deltas[name] for edit in edits if name in edit.deltas], name) for name in names},
        tuple(request for edit in edits for request in edit.requests),
        " + ".join(dict.fromkeys(edit.method for edit in edits)),
        dict(edits[0].hparams) if same else {},
    )
    return dataclasses.replace(added, info={"n_edits": len(edits), "update_norm": added.norm()})


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
        deltas[name] = _only(update, _largest(relative, round(keep * update.numel())))
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


def pca(edit: Edit, lm: EditableModel, *, n_components: int, variant: str = "proper") -> tuple[Deltas, dict]:
    """Principal components of each update, whose rows are those of ΔWᵀ (d_in, d_out): d_in samples of d_out features.

    That is the orientation in which GPT-2 stores its weights, taken here for every architecture.
    variant "proper": ΔWᵀ is projected on the first components and transformed back, its mean row included; a rank-one
    update loses nothing. "as_released": what RECT's published code does, the scores written into the first n_components
    columns of zeros, without the way back; they are coordinates in another basis than the model's, so that little is
    left of the edit. The sign of a component, free in theory, is that which makes its largest entry positive.

    The update of a bias, a single sample, has no components and stays as it is.
    """
    check_choice("variant", variant, ("proper", "as_released"))
    check_number("n_components", n_components, least=1, whole=True)
    deltas = {}
    for name, delta in edit.deltas.items():
        if lm.model.get_parameter(name).dim() == 1:
            deltas[name] = delta
            continue
        if n_components > min(delta.shape):
            raise MethodError(f"n_components is {n_components}, but {name} is {delta.shape} and has no more than that")
        _check_finite(name, delta)
        mean, centred = delta.centred()
        # ΔW less its mean = U diag(s) Vᵀ: the components are U's columns, the scores V diag(s).
        u, s, vh = centred.svd()
        u, s, vh = u[:, :n_components], s[:n_components], vh[:n_components]
        if variant == "proper":
            update = (u * s) @ vh + mean
        else:
            largest = u.gather(0, u.abs().argmax(0, keepdim=True))
            update = torch.zeros(delta.shape, dtype=u.dtype, device=u.device)
            update[: len(s)] = (s[:, None] * vh) * torch.where(largest < 0, -1.0, 1.0).T
        deltas[name] = Dense(update.to(delta.dtype))
    return deltas, {}


def prune(edit: Edit, lm: EditableModel, *, base: float = math.e, function: str = "log") -> tuple[Deltas, dict]:
    """PRUNE: the large singular values of an accumulated update (`accumulated(edits)`) are held back.

    ΔW = U diag(s) Vᵀ, and m is the largest singular value of the unedited weight W₀. Each s_i ≥ m becomes
    log_a(s_i) - log_a(m) + m for function "log" (a = `base` > 1; the paper takes e, 2, 1.5 or 1.2), or (s_i + m) / 2
    for "linear"; smaller ones stay, and an update without larger ones is returned as it is. Low rank stays low.

    Near m the logarithm has the slope 1 / (m ln a): where m < 1 / ln a it makes singular values LARGER. The formula is
    kept as published, and a warning says so when it happens.

    info: regulariser_limit, m of each weight, and regulariser_restrained, how many singular values were changed.
    ModelError for a model that carries edits: W₀ is its unedited weight.
    """
    if lm.n_applied:
        raise ModelError(f"prune compares with the unedited weights, but {lm.name} carries {lm.n_applied} edit(s)")
    check_choice("function", function, ("log", "linear"))
    check_number("base", base, above=1, below=math.inf)
    deltas, limits, restrained = {}, [], []
    for name, delta in edit.deltas.items():
        _check_finite(name, delta)
        limit = float(torch.linalg.matrix_norm(lm.oriented(name).double(), 2))
        svd = delta.svd()
        s = svd.s
        large = s >= limit
        changed = (s + limit) / 2 if function == "linear" else (s / limit).log() / math.log(base) + limit
        if (changed > s)[large].any():
            warnings.warn(
                f"prune enlarges singular values of {name}: its unedited weight has none above {limit:.3g}, where "
                f"log to the base {base:.3g} is steep; use a larger base, or function='linear'",
                stacklevel=3,
            )
        deltas[name] = delta.with_svd(svd._replace(s=torch.where(large, changed, s))) if large.any() else delta
        limits.append(limit)
        restrained.append(int(large.sum()))
    return deltas, {"limit": limits, "restrained": restrained}


def scale(
    edit: Edit,
    lm: EditableModel,
    *,
    factor: float | None = None,
    norm: float | None = None,
    like: Edit | None = None,
) -> tuple[Deltas, dict]:
    """Plain scaling: the control that tells what sparsity does from what a smaller norm does. Low rank stays low.

    Exactly one of: factor, for all weights; norm, the Frobenius norm of the whole update, over all weights; like, an
    edit of the same weights, each of which gets that edit's norm. info: regulariser_factors, that of each weight.
    """
    if sum(value is not None for value in (factor, norm, like)) != 1:
        raise MethodError("scale takes exactly one of factor, norm, like")
    if like is not None:
        if not isinstance(like, Edit) or set(like.deltas) != set(edit.deltas):
            raise MethodError("scale's like must be an Edit of the same weights")
        factors = {n: _ratio(like.deltas[n].norm(), delta.norm()) for n, delta in edit.deltas.items()}
    else:
        value = factor if norm is None else norm
        check_number("factor" if norm is None else "norm", value, least=0, below=math.inf)
        factors = {name: value if norm is None else _ratio(norm, edit.norm()) for name in edit.deltas}
    deltas = {name: delta.scaled(factors[name]) for name, delta in edit.deltas.items()}
    return deltas, {"factors": list(factors.values())}


# (edit, lm, **arguments) -> the new updates, and what `info` says about them besides the arguments
REGULARISERS: dict[str, Callable[..., tuple[Deltas, dict]]] = {
    function.__name__: function for function in (rect, random, pca, prune, scale)
}


def _arguments(name: str, function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments with their defaults; MethodError for unknown and for missing ones."""
    known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise MethodError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    arguments = {**known, **given}
    missing = [argument for argument, value in arguments.items() if value is inspect.Parameter.empty]
    if missing:
        raise MethodError(f"{name} needs {' and '.join(missing)}")
    return arguments


def _check_finite(name: str, delta: Update) -> None:
    if not delta.isfinite():
        raise MethodError(f"the update of {name} holds NaN or infinite values, of which there are no singular values")


def _only(update: Float[Tensor, "d_out d_in"], kept: Bool[Tensor, " n"]) -> Dense:
    """The update's entries that are kept, counted row by row; all others 0."""
    return Dense(torch.where(kept.view(update.shape).to(update.device), update, 0))


def _largest(scores: Float[Tensor, " n"], n: int) -> Bool[Tensor, " n"]:
    """Where the n largest are; of equal ones the first."""
    if n == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - n + 1).values
    above, tied = scores > threshold, scores == threshold
    return above | (tied & (tied.cumsum(0) <= n - above.sum()))


def _ratio(norm: float, present: float) -> float:
    if present == norm:
        return 1.0
    if present == 0:
        raise MethodError("an update of zero cannot be scaled to any other norm")
    return norm / present
