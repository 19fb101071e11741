"""What makes an edit smaller or sparser after it was computed: Edit -> Edit, so each combines with every method.

    regularise(edit, lm, "rect", keep=0.4)              # RECT: the 40 % largest changes relative to the weight
    regularise(edit, lm, "random", keep=0.4, seed=0)    # its control: any 40 %
    regularise(edit, lm, "scale", like={"name": "rect", "keep": 0.4})   # its other control: shrunk to the same norm
    regularise(accumulated(edits), lm, "prune")         # PRUNE: of a whole sequence
    regularise(edit, lm, "imitate", kind="gaussian", seed=0)            # noise of the same norm

All see an update in orientation (d_out, d_in), so a transposed architecture makes no difference. A bias is a weight of
one column to them.
The functions are in selection.py, spectra.py and imitations.py, with their sources; `scale` is here.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from nbkit.edits.edit import Edit, as_edits
from nbkit.edits.editable import EditableModel
from nbkit.edits.imitations import imitate
from nbkit.edits.inputs import moment_of
from nbkit.edits.selection import random, rect, select
from nbkit.edits.spectra import pca, prune, sphere
from nbkit.edits.updates import Deltas, total
from nbkit.errors import MethodError
from nbkit.records.bounds import check_choice, check_number


def regularise(edit: Edit, lm: EditableModel, name: str, **arguments: Any) -> Edit:
    """The edit with its updates regularised by one of `REGULARISERS`; `arguments` are those of the function there.

    lm: the model as it is before this edit, so call it before the edit is applied. Requests, method and hparams stay.
    `info` keeps what the method measured of its own update, and gets the update_norm of the new one, "regulariser" (the
    name; "rect + scale" where one follows another), "regulariser_<argument>" for each argument (but an Edit or second
    moments), and "regulariser_norm_ratio", the new norm over the old. MethodError for an unknown name, argument or
    value, ModelError for an edit that does not fit lm.
    """
    if not isinstance(edit, Edit):
        raise MethodError(f"regularise takes one Edit, not a {type(edit).__name__}; nbkit.edit gives a list of them")
    function = _named(name)
    for weight, delta in edit.deltas.items():
        lm.weight_of(weight, delta)
    given = _arguments(name, function, arguments)
    deltas, measured = function(edit, lm, **given)
    before, new = edit.norm(), dataclasses.replace(edit, deltas=deltas)
    after, earlier = new.norm(), edit.info.get("regulariser")
    about = {
        argument: dict(value) if isinstance(value, Mapping) else value
        for argument, value in given.items()
        if value is not None and argument != "second_moments" and not isinstance(value, Edit)
    }
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


def scale(
    edit: Edit,
    lm: EditableModel,
    *,
    factor: float | None = None,
    norm: float | None = None,
    like: Edit | Mapping[str, Any] | None = None,
    measure: str = "norm",
    second_moments: Mapping[str, Tensor] | None = None,
) -> tuple[Deltas, dict]:
    """Plain scaling: the control that tells what sparsity does from what a smaller norm does. Low rank stays low.

    Exactly one of: factor, for all weights; norm, of the whole update, over all weights; like, each weight gets the
    norm that it has in another edit of the same weights, or in this one regularised otherwise: {"name": "rect",
    "keep": 0.4}, the name and the arguments of a regulariser.

    measure: which norm: "norm", ‖ΔW‖_F, or "felt", ‖ΔW C^½‖_F = √E‖ΔW k‖², which needs second_moments, {weight name:
    C} (`inputs.moment_of`). Those are handed on to the regulariser that `like` names.
    info: regulariser_factors, that of each weight.
    """
    if sum(value is not None for value in (factor, norm, like)) != 1:
        raise MethodError("scale takes exactly one of factor, norm, like")
    check_choice("measure", measure, ("norm", "felt"))

    def norms(deltas: Deltas) -> dict[str, float]:
        if measure == "norm":
            return {name: delta.norm() for name, delta in deltas.items()}
        return {n: delta.to(lm.device).felt_norm(moment_of(second_moments, n, lm)) for n, delta in deltas.items()}

    if factor is not None:
        if measure != "norm":
            raise MethodError(f"a factor is the same in every norm: give scale no measure={measure!r} beside it")
        check_number("factor", factor, least=0, below=math.inf)
        factors = dict.fromkeys(edit.deltas, factor)
    elif norm is not None:
        check_number("norm", norm, least=0, below=math.inf)
        whole = math.sqrt(sum(each**2 for each in norms(edit.deltas).values()))
        factors = {name: _ratio(norm, whole) for name in edit.deltas}  # none, of an edit without updates
    else:
        wanted, present = norms(_other(like, edit, lm, second_moments)), norms(edit.deltas)
        factors = {name: _ratio(wanted[name], present[name]) for name in edit.deltas}
    deltas = {name: delta.scaled(factors[name]) for name, delta in edit.deltas.items()}
    return deltas, {"factors": list(factors.values())}


def _other(like: Any, edit: Edit, lm: EditableModel, second_moments: Mapping[str, Tensor] | None) -> Deltas:
    """The updates that `scale` compares with."""
    if isinstance(like, Mapping):
        arguments = {argument: value for argument, value in like.items() if argument != "name"}
        if "second_moments" in arguments:
            raise MethodError("give second_moments to scale itself, which hands them on, not to its like")
        function = _named(like.get("name"))
        if second_moments is not None and "second_moments" in inspect.signature(function).parameters:
            arguments["second_moments"] = second_moments
        return function(edit, lm, **_arguments(like["name"], function, arguments))[0]
    if not isinstance(like, Edit) or set(like.deltas) != set(edit.deltas):
        raise MethodError(
            "scale's like must be an Edit of the same weights, or a regulariser with its arguments such as "
            '{"name": "rect", "keep": 0.4}'
        )
    return like.deltas


# (edit, lm, **arguments) -> the new updates, and what `info` says about them besides the arguments
REGULARISERS: dict[str, Callable[..., tuple[Deltas, dict]]] = {
    function.__name__: function for function in (rect, random, pca, prune, scale, select, imitate, sphere)
}


def _named(name: Any) -> Callable[..., tuple[Deltas, dict]]:
    if not isinstance(name, str) or name not in REGULARISERS:
        raise MethodError(f"unknown regulariser {name!r}; known: {', '.join(REGULARISERS)}")
    return REGULARISERS[name]


def _arguments(name: str, function: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """All arguments with their defaults; MethodError for unknown and for missing ones."""
    known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(map(str, set(given) - set(known)))
    if unknown:
        raise MethodError(f"{name} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    arguments = {**known, **given}
    missing = [argument for argument, value in arguments.items() if value is inspect.Parameter.empty]
    if missing:
        raise MethodError(f"{name} needs {' and '.join(missing)}")
    return arguments


def _ratio(norm: float, present: float) -> float:
    if present == norm:
        return 1.0
    if present == 0:
        raise MethodError("an update of zero cannot be scaled to any other norm")
    return norm / present
