"""The edits that stay in a model's weights until they are taken back: `lm.apply(edit)`, `lm.undo()`, `lm.history()`.

One pristine copy is kept of each weight that is touched. Undoing restores it and adds the remaining edits again, in
their order: the same sums as when they were applied, so the same bits. A weight less an update would keep the rounding.
"""

from functools import partial

import pandas as pd

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel, Overlay
from nbkit.edits.overlays import lay_over
from nbkit.errors import ModelError


class Ledger(Overlay):
    """The lowest overlay of a model. Its methods are those of LanguageModel, where they are described."""

    def apply(self, lm: EditableModel, edit: Edit) -> None:
        self._check_nothing_above(lm, "apply")
        if not isinstance(edit, Edit):
            raise ModelError(f"apply takes one Edit, not a {type(edit).__name__}; nbkit.edit gives a list of them")
        lay_over(lm, self, edit)

    def undo(self, lm: EditableModel, n: int = 1) -> list[Edit]:
        self._check_nothing_above(lm, "undo")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ModelError(f"undo takes the number of edits, from 1 on, not {n!r}")
        if n > len(self.laid):
            raise ModelError(f"cannot undo {n}: the number of edits applied to {lm.name} is {len(self.laid)}")
        turns = sorted(self.laid)[-n:]
        removed = [self.laid[turn] for turn in turns]
        lm.change(partial(lm.take_out, turns))
        return removed

    def history(self) -> pd.DataFrame:
        columns = ["method", "n_requests", "request", "target_new", "weights", "update_norm"]
        rows = [
            [
                edit.method,
                len(edit.requests),
                edit.requests[0].text if edit.requests else "",
                edit.requests[0].target_new if edit.requests else "",
                ", ".join(edit.deltas),
                edit.norm(),
            ]
            for edit in self.edits
        ]
        return pd.DataFrame(rows, columns=columns)

    def _check_nothing_above(self, lm: EditableModel, verb: str) -> None:
        lm.take_turn()
        lm.check_thread()
        if len(lm.overlays) > 1:
            raise ModelError(
                f"{verb} inside `with applied(...)` or a loop over `edit_sequence` would be taken back when that ends; "
                f"{verb} before or after it (an iterator that was broken off is ended by its close())"
            )
