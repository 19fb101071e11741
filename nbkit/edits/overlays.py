"""Applying an edit is a `with`, and leaving restores every bit.

    with applied(lm, edit):
        ...                              # lm.model is the edited model here

    with unedited(lm):
        ...                              # here it is the model without any edit, those of `lm.apply` too

They may be left in any order, by any thread, and by the garbage collector: what the others added is then in the weights
as if this had never been. Edits that shall stay until they are taken back are the ledger's (`lm.apply`, `lm.undo`;
edits/ledger.py).
"""

import threading
from collections.abc import Callable
from functools import partial

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel, Overlay
from nbkit.edits.interrupts import Guarded
from nbkit.errors import MethodError, ModelError
from nbkit.records.bounds import shown


class restoring(Guarded):
    """`as` gives a function that adds an edit to the weights; may be called repeatedly. Leaving takes all of them out.

    Keeps one copy of each weight that is touched, however many edits are added. ModelError while another thread is
    using the model.
    """

    def __init__(self, lm: EditableModel):
        lm.take_turn()
        self.lm, self.overlay = lm, Overlay()

    def begin(self) -> Callable[[Edit], None]:
        with self.lm.lock:
            self.lm.check_thread()
            self.overlay.thread, self.overlay.depth = threading.current_thread(), len(self.lm.uses)
            self.lm.overlays.append(self.overlay)
        return partial(lay_over, self.lm, self.overlay)

    def end(self, error: BaseException | None) -> None:
        self.overlay.ended = True
        self.lm.settle()


class applied(restoring):
    """The weights carry `edit` inside the `with`; on leaving, also by an exception, each bit is what it was.

    Nests: the inner edit comes on top of the outer one. ModelError for a weight the model does not have, of another
    shape, or not in memory, and while another thread is using the model; MethodError for what is no Edit.
    """

    def __init__(self, lm: EditableModel, edit: Edit):
        super().__init__(lm)
        if not isinstance(edit, Edit):
            raise MethodError(f"one Edit can be applied at a time, as nbkit.edit gives it, not {shown(edit)}")
        self.edit = edit

    def begin(self) -> EditableModel:
        super().begin()(self.edit)
        return self.lm


def lay_over(lm: EditableModel, overlay: Overlay, edit: Edit) -> None:
    """Adds an edit to the weights and to an overlay, whole or not at all. ModelError if it does not fit the weights, if
    the overlay has ended, and while another thread is using the model."""
    lm.change(partial(_lay_over, lm, overlay, edit))


def _lay_over(lm: EditableModel, overlay: Overlay, edit: Edit) -> None:
    if overlay.ended or overlay not in lm.overlays:
        raise ModelError(
            f"an edit was to be added to {lm.name} in a `with` or a loop over `edit_sequence` that has ended, or is "
            "set aside by `unedited`; begin it anew"
        )
    weights = {name: lm.weight_of(name, delta) for name, delta in edit.deltas.items()}
    turn = max((turn for turn, _, _ in lm.laid), default=0) + 1
    overlay.laid[turn] = edit  # counted first and until it is out again: the hash is never remembered in between
    try:
        for name, delta in edit.deltas.items():
            if name not in overlay.below:
                overlay.below[name] = weights[name].detach().clone()
            lm.add_update(name, delta)
    except BaseException:  # out of memory, say
        lm.take_out({turn})
        raise


class unedited(Guarded):
    """The weights are without any edit inside the `with`, and `lm.hash` says so; on leaving, each bit is back.

    What belongs to the unedited model (context templates, second moments) is made in here, whatever is applied. The
    ledger is closed meanwhile. Holds one more copy of each weight that edits have changed. Leaving ends what was begun
    inside and is not left yet.
    """

    def __init__(self, lm: EditableModel):
        lm.take_turn()
        self.lm = lm

    def begin(self) -> EditableModel:
        lm = self.lm
        with lm.lock:
            lm.check_thread()
            self.depth, self.before, weights = len(lm.uses), lm.overlays, lm.unedited_weights
            self.edited = {name: lm.model.get_parameter(name).detach().clone() for name in weights}
            lm.set_aside.append(self)
            for name, weight in weights.items():
                lm.put(name, weight)
            closing = Overlay(thread=threading.current_thread(), depth=self.depth)
            lm.overlays = [*(type(overlay)() for overlay in self.before), closing]
        return lm

    def end(self, error: BaseException | None) -> None:
        lm = self.lm
        with lm.lock:
            while self in lm.set_aside:
                lm.set_aside[-1]._give_back()
            lm.settle()

    def _give_back(self) -> None:
        lm = self.lm
        if lm.overlays is not self.before:  # begun to its end
            for name, weight in lm.unedited_weights.items():
                lm.put(name, weight)
            for overlay in lm.overlays:
                overlay.ended = True
        lm.overlays = self.before
        for name, weight in self.edited.items():
            lm.put(name, weight)
        lm.set_aside.pop()
