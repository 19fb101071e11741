"""The explorer's views, one at a time: the outcome, pinned ones, the ledger, layers, a stored sequence, code."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from ipywidgets import ToggleButtons, VBox, Widget

from nbkit.panels import fragments, outcome, sweeps
from nbkit.panels.code import Code
from nbkit.panels.copying import CopyButton
from nbkit.panels.sequence_view import sequences
from nbkit.studies.one_edit import Outcome


class Views(VBox):
    """Buttons that choose a view, and the view. ledger: the widget of that view."""

    def __init__(self, ledger: Widget):
        self.outcome, self.compared, self.layers, self.code = (fragments.html() for _ in range(4))
        self.copy, self._sequence = CopyButton(), None
        self._of = {
            "Outcome": [self.outcome],
            "Compare": [self.compared],
            "Ledger": [ledger],
            "Layers": [self.layers],
            "Sequence": None,
            "Code": [self.copy, self.code],
        }
        self.chosen = ToggleButtons(options=list(self._of), description="Show", style={"button_width": "auto"})
        self.chosen.observe(lambda _: self._show(), "value")
        self._view = VBox()
        super().__init__([self.chosen, self._view])
        self.outcome.value = fragments.note("Nothing is edited yet: choose a request and press Edit.")
        self.show_pinned({})
        self.show_layers([])
        self._show()

    def choose(self, view: str) -> None:
        self.chosen.value = view

    def show_outcome(self, found: Outcome, title: str, among: pd.DataFrame | None) -> None:
        """An edit of the settings `title`; among: as for `outcome.figure`."""
        asked = f"“{found.request.text}” → “{found.request.target_new}”"
        about = f"<p>{fragments.escape(f'{title}: {asked}')}</p>"
        self.outcome.value = about + outcome.shown(found, among)

    def show_pinned(self, pinned: Mapping[str, Outcome]) -> None:
        nothing = fragments.note("Nothing is pinned: press Pin after an edit, then edit with other settings.")
        self.compared.value = outcome.compared(pinned) if pinned else nothing

    def show_layers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.layers.value = sweeps.shown(rows)

    def show_code(self, code: Code) -> None:
        self.copy.text = str(code)
        self.code.value = f"<pre>{fragments.escape(str(code))}</pre>"

    def _show(self) -> None:
        if self.chosen.value == "Sequence" and self._sequence is None:
            self._sequence = [sequences()]  # reads what is stored only when it is asked for
        self._view.children = self._of[self.chosen.value] or self._sequence
