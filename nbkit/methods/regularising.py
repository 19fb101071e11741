"""Updates that are regularised as they are made, before a guard looks at them and before they are in the weights.

    for step in nbkit.edit_sequence(lm, requests, regularise={"name": "rect", "keep": 0.4}):
        step.edit.info["regulariser_norm_ratio"]

What is asked for is a mapping of texts and numbers, so that a parameter of a notebook or a file can be it: the name of
one of `edits.regularisers.REGULARISERS`, and its arguments, among them second_moments where it goes by what is felt.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.regularisers import REGULARISERS, regularise
from nbkit.errors import MethodError
from nbkit.records.bounds import check_choice, shown


def regularising(lm: EditableModel, asked: Mapping[str, Any] | None) -> Callable[..., Edit]:
    """(edit, step=None) -> the edit regularised against the weights as they then are; as it is where None is asked for.

    step: the index of a step of a sequence, for which what is random is drawn anew: each `seed` among the arguments, of
    a regulariser inside another too, gives way to one that it and the index determine. A sequence shall not end where
    nothing can be regularised: an update that is zero or not finite, or whose weight is not finite any more, stays as
    it is, and its `regulariser_norm_ratio` is NaN.

    MethodError at once for what is no such mapping, an unknown name or argument, or a value that cannot be; and for
    prune, which is of all edits together.
    """
    if asked is None:
        return lambda edit, step=None: edit
    if not isinstance(asked, Mapping) or "name" not in asked:
        raise MethodError(
            f'regularise must be a regulariser by name and its arguments, as {{"name": "rect", "keep": 0.4}}, '
            f"not {shown(asked)}"
        )
    check_choice("the name of regularise", asked["name"], list(REGULARISERS))
    if asked["name"] == "prune":
        raise MethodError(
            "prune is of the accumulated update of unedited weights, not of one edit as it is made: make the edits "
            'without it, then nbkit.regularise(nbkit.accumulated(edits), lm, "prune")'
        )
    try:
        regularise(Edit({}), lm, **asked)  # an edit without updates, of which the arguments alone are looked at
    except TypeError as error:
        raise MethodError(f"regularise cannot be {shown(dict(asked))}: {error}") from error
    return partial(_regularised, lm, dict(asked))


def regulariser_words(asked: Mapping[str, Any] | None) -> str:
    """What is asked for in words: "rect keep=0.4", "scale like=(rect keep=0.4)", "none"; without second moments."""
    if asked is None:
        return "none"
    words = [f"{name}=({regulariser_words(value)})" if isinstance(value, Mapping) else f"{name}={value}"
             for name, value in asked.items() if name not in ("name", "second_moments")]  # fmt: skip
    return " ".join([str(asked["name"]), *words])


def _regularised(lm: EditableModel, asked: Mapping[str, Any], edit: Edit, step: int | None = None) -> Edit:
    if step is None:
        return regularise(edit, lm, **asked)
    if not _has_direction(lm, edit):
        info = {**edit.info, "regulariser": asked["name"], "regulariser_norm_ratio": math.nan}
        return dataclasses.replace(edit, info=info)
    return regularise(edit, lm, **_of_step(asked, step))


def _has_direction(lm: EditableModel, edit: Edit) -> bool:
    finite = all(d.isfinite() and lm.model.get_parameter(n).isfinite().all() for n, d in edit.deltas.items())
    return finite and edit.norm() > 0


def _of_step(asked: Mapping[str, Any], step: int) -> dict[str, Any]:
    found = {name: _of_step(value, step) if isinstance(value, Mapping) else value for name, value in asked.items()}
    if found.get("seed") is not None:
        found["seed"] = int(np.random.SeedSequence([int(found["seed"]), step]).generate_state(1)[0])
    return found
