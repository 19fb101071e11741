"""Applying an edit is a `with`, and leaving restores every bit.

    with applied(lm, edit):
        ...                              # lm.model is the edited model here

    with unedited(lm):
        ...                              # here it is the model without any edit, those of `lm.apply` too

Edits that shall stay until they are taken back are the ledger's (`lm.apply`, `lm.undo`; edits/ledger.py).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel, Overlay


@contextmanager
def applied(lm: EditableModel, edit: Edit) -> Iterator[EditableModel]:
    """The weights carry `edit` inside the `with`; on leaving, also by an exception, each bit is what it was.

    Nests: the inner edit comes on top of the outer one and goes first. ModelError for a weight the model does not
    have, of another shape, or not in memory.
    """
    with restoring(lm) as add:
        add(edit)
        yield lm


@contextmanager
def restoring(lm: EditableModel) -> Iterator[Callable[[Edit], None]]:
    """Yields a function that adds an edit to the weights; may be called repeatedly. Leaving undoes all of them.

    Keeps one copy of each weight that is touched, however many edits are added.
    """
    overlay = Overlay()
    lm.overlays.append(overlay)
    try:
        yield partial(lay_over, lm, overlay)
    finally:
        _put(lm, overlay.below)
        lm.overlays.remove(overlay)


def lay_over(lm: EditableModel, overlay: Overlay, edit: Edit) -> None:
    """Adds an edit to the weights and to an overlay. ModelError, before any changes, if it does not fit them."""
    weights = {name: lm.weight_of(name, delta) for name, delta in edit.deltas.items()}
    overlay.edits.append(edit)
    for name, delta in edit.deltas.items():
        if name not in overlay.below:
            overlay.below[name] = weights[name].detach().clone()
        lm.add_update(name, delta)


@contextmanager
def unedited(lm: EditableModel) -> Iterator[EditableModel]:
    """The weights are without any edit inside the `with`, and `lm.hash` says so; on leaving, each bit is back.

    What belongs to the unedited model (context templates, second moments) is made in here, whatever is applied. The
    ledger is closed meanwhile. Holds one more copy of each weight that edits have changed.
    """
    before = lm.overlays
    edited = {name: lm.model.get_parameter(name).detach().clone() for name in lm.unedited_weights}
    try:
        _put(lm, lm.unedited_weights)
        lm.overlays = [*(type(overlay)() for overlay in before), Overlay()]
        yield lm
    finally:
        lm.overlays = before
        _put(lm, edited)


@torch.no_grad()
def _put(lm: EditableModel, weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        lm.model.get_parameter(name).copy_(weight)
