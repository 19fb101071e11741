"""The edits that are in a model's weights, and taking them back.

    view = ledger(lm)              # a widget: the last line of a cell shows it
    view.refresh()                 # after `lm.apply` or `lm.undo` in a cell
    view.on_change(callback)       # called after an undo from here

The view of `lm.history()`, `lm.undo(n)` and `lm.hash`.
"""

from collections.abc import Callable

from ipywidgets import Button, HBox, Layout, VBox

from nbkit.edits.edit import Edit
from nbkit.errors import NbkitError
from nbkit.models.language_model import LanguageModel, check_model
from nbkit.panels import fragments
from nbkit.panels.jobs import jobs_of

JOB = "undo"
HEADINGS = {
    "method": "method",
    "n_requests": "requests",
    "request": "first request",
    "target_new": "new target",
    "weights": "weights",
    "update_norm": "‖ΔW‖",
}
WORDS = ["method", "first request", "new target", "weights"]


class LedgerView(VBox):
    """A table of the edits of `lm.apply`, whether the weights are the unedited ones, and buttons that undo.

    An undo is a job of the model, so it never runs beside another; what refuses it is told in words and changes
    nothing. The hash reads all weights once whenever it is shown of an edited model.
    """

    def __init__(self, lm: LanguageModel):
        self.lm, self.jobs = check_model(lm), jobs_of(lm)
        self._callbacks: list[Callable[[], None]] = []
        self.state, self.notice = fragments.html(), fragments.html()
        wide = Layout(width="auto")
        self.undo_last = Button(description="Undo the last", layout=wide)
        self.undo_all = Button(description="Undo all", layout=wide)
        self.again = Button(description="Refresh", layout=wide)
        self.undo_last.on_click(lambda _: self._undo(1))
        self.undo_all.on_click(lambda _: self._undo(max(len(self.lm.ledger.edits), 1)))
        self.again.on_click(lambda _: self._refresh_button())
        buttons = HBox([self.undo_last, self.undo_all, self.again], layout=Layout(flex_flow="row wrap"))
        style = fragments.html(fragments.STYLE)
        super().__init__([style, self.state, buttons, self.notice], layout=Layout(width="100%", max_width="1200px"))
        self.refresh()

    def refresh(self) -> None:
        """Shows the model as it is now."""
        frame = self.lm.history().rename(columns=HEADINGS)
        frame.index = range(1, len(frame) + 1)
        if frame.empty:
            listed = fragments.note(f"No edit is applied to {self.lm.title}.")
        else:
            listed = fragments.table(frame, f"Edits applied to {self.lm.title}, in order", words=WORDS)
        self.state.value = listed + self._weights()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` after edits were undone from here, when the table shows it."""
        self._callbacks.append(callback)

    def _weights(self) -> str:
        """Hash, whether it is that of the unedited model, and edits that are none of the ledger's."""
        try:
            self.jobs.check_free()
            now, unedited = self.lm.hash, self.lm.base_hash
        except NbkitError as error:  # as while a job is at work on the model
            return fragments.error(error)
        n_others = self.lm.n_applied - len(self.lm.ledger.edits)
        which = "those of the unedited model, bit for bit" if now == unedited else "not those of the unedited model"
        others = f"; {n_others} of the edits in them {'is' if n_others == 1 else 'are'} of an open `with` or loop"
        return fragments.note(f"The weights are {which} (hash {now[:16]}…){others if n_others else ''}.")

    def _undo(self, n: int) -> None:
        if not self.jobs.start(JOB, lambda step: self.lm.undo(n), self._undone, self._failed):
            current = self.jobs.current
            what = f"“{current.name}” is" if current else "another job was"
            self.notice.value = fragments.note(f"Nothing is undone: {what} at work on the model. Try again later.")

    def _undone(self, edits: list[Edit]) -> None:
        self.refresh()
        self.notice.value = fragments.note(f"{len(edits)} edit{'s are' if len(edits) > 1 else ' is'} undone.")
        for callback in self._callbacks:
            callback()

    def _failed(self, error: BaseException) -> None:
        self.refresh()
        self.notice.value = fragments.error(error)

    def _refresh_button(self) -> None:
        self.notice.value = ""
        self.refresh()


def ledger(lm: LanguageModel) -> LedgerView:
    """The edits in a model's weights, with buttons that take them back: see LedgerView."""
    return LedgerView(lm)
