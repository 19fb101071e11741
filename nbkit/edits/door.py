"""The door of every verb: what is true of a model when a verb begins, and again when it is through.

    @verb
    def perplexity(lm, texts): ...

A verb begins only if no other thread is using the model (for a panel's job it waits, and a job for it) and nothing
foreign lies on its modules (edits/placed.py).
However it ends, hooks and edits that it put there are gone, and what the garbage collector ended meanwhile (a loop over
`edit_sequence` that was dropped) is taken out then, not in the middle. Verbs inside a verb pass without a look at all
modules again.
"""

import functools
import threading
from collections.abc import Callable

import torch

from nbkit.edits import placed
from nbkit.edits.interrupts import Guarded
from nbkit.errors import ModelError
from nbkit.records.bounds import shown


class in_use(Guarded):
    """A verb at work on `lm`, an EditableModel. ModelError as said above."""

    def __init__(self, lm):
        lm.take_turn()
        self.lm = lm

    def begin(self) -> None:
        lm = self.lm
        with lm.lock:
            lm.check_thread()
            lm.settle()
            if not lm.uses:
                placed.check(lm.model, lm.name)
            self.thread, self.number = threading.current_thread(), placed.next_number()
            self.gradients = torch.is_grad_enabled()
            lm.uses.append(self)

    def end(self, error: BaseException | None) -> None:
        lm = self.lm
        if self not in lm.uses:
            return
        placed.end_since(self.number)
        torch.set_grad_enabled(self.gradients)  # torch's own `with` is left half way by an interrupt
        with lm.lock:
            del lm.uses[lm.uses.index(self) :]
            lm.end_above(len(lm.uses))


def verb(function: Callable) -> Callable:
    """A function whose first argument is the model `lm`, behind the door; ModelError for what is no model there."""

    @functools.wraps(function)
    def at_work(lm, *args, **kwargs):
        if not hasattr(lm, "uses"):  # of EditableModel, which has a door of its own and so stands above this
            raise ModelError(f"a LanguageModel is needed, as nbkit.load gives it, not {shown(lm)}")
        with in_use(lm):
            return function(lm, *args, **kwargs)

    return at_work
