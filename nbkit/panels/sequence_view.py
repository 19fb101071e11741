"""Stored sequences of edits, step by step: what was edited, and what became of the model and of earlier edits.

    view = sequences()             # a widget: the last line of a cell shows it
    view.key, view.seed, view.step # what it shows, of `records.sequences`

The view of `stored_sequences`, `sequence_rows`, `step_values` and `step_scores` of nbkit.records.sequences, and of
`plots.sequence_step`. No model is needed.
"""

from html import escape
from typing import Any

import pandas as pd
from ipywidgets import Button, Dropdown, HBox, IntSlider, Layout, VBox
from matplotlib.figure import Figure

from nbkit.errors import ResultsError
from nbkit.panels import fragments
from nbkit.plots import paper_style, sequence_step
from nbkit.records.sequences import SEQUENTIAL, sequence_rows, step_scores, step_values, stored_sequences

HOW = (
    "`python -m nbkit run 03_sequential_edits` makes such rows, as does running that notebook; then press “Look again”."
)

NAMES = {
    "forgotten": "said right after less said now",
    "forgotten_generated": "the same, of what is generated",
    "drift": "‖W - W₀‖",
    "drift_felt": "what text feels of that",
    "drift_felt_relative": "over what it feels of W₀",
    "update_norm": "‖ΔW‖",
    "optimised_probability": "target probability in the search for v*",
    "final_loss": "loss at the end of that search",
    "n_steps": "its steps",
    "stop_reason": "what ended it",
}


class SequenceView(VBox):
    """Two lists, of sequences by their words and of their orders, a slider over the steps, and what was stored there.

    Rows are read when the widget is made and by “Look again”. Where none are stored it says in words how they are made.
    """

    def __init__(self, study: str = SEQUENTIAL):
        self.study = study
        self.found, self.rows = pd.DataFrame(), pd.DataFrame()
        wide = Layout(width="100%", max_width="860px")
        label = {"description_width": "70px"}
        self.sequence = Dropdown(description="Sequence", layout=wide, style=label)
        self.order = Dropdown(description="Order", layout=Layout(width="220px"), style=label)
        self.slider = IntSlider(
            description="Step", min=0, max=0, continuous_update=False, layout=Layout(width="520px"), style=label
        )
        self.again = Button(description="Look again", layout=Layout(width="auto", align_self="flex-start"))
        self.said, self.drawing, self.notice = fragments.html(), fragments.html(), fragments.html()
        half = Layout(flex="1 1 400px", min_width="0")
        self.said.layout, self.drawing.layout = half, half
        self.controls = VBox([self.sequence, HBox([self.order, self.slider], layout=Layout(flex_flow="row wrap"))])
        beside = Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="4px 24px")
        self.sides = HBox([self.said, self.drawing], layout=beside)
        style = fragments.html(fragments.STYLE)
        super().__init__(
            [style, self.controls, self.notice, self.again, self.sides],
            layout=Layout(width="100%", max_width="1200px"),
        )
        self._filling = False  # while lists are filled anew, their values change by themselves
        for control, follow in ((self.sequence, self._orders), (self.order, self._steps), (self.slider, self._show)):
            control.observe(lambda change, follow=follow: self._filling or follow(), "value")
        self.again.on_click(lambda _: self.refresh())
        self.refresh()

    @property
    def key(self) -> str | None:
        return self.sequence.value

    @property
    def seed(self) -> int | None:
        return self.order.value

    @property
    def step(self) -> int:
        """The last step up to where the slider is: where an edit carries several requests, not every number is one."""
        if self.rows.empty:
            return 0
        steps = self.rows.loc[self.rows["seed"] == self.seed, "n_edits"]
        return int(steps[steps <= self.slider.value].max())

    def refresh(self) -> None:
        """Reads anew what is stored; the sequence shown stays, if it is still there."""
        before = self.key
        try:
            self.found = stored_sequences(self.study)
        except ResultsError as error:
            self.notice.value = fragments.error(error) + fragments.note(HOW)
            self.controls.layout.display = self.sides.layout.display = "none"
            return
        self.notice.value = ""
        self.controls.layout.display = self.sides.layout.display = None
        self._fill(self.sequence, _words(self.found), before)
        self._orders()

    def _fill(self, control: Dropdown, options: list[tuple[str, Any]], before: Any) -> None:
        """Other options; what was chosen stays if it is among them, else the first is."""
        self._filling = True
        control.options = options
        values = [value for _, value in options]
        control.value = before if before in values else values[0]
        self._filling = False

    def _orders(self) -> None:
        self.rows = sequence_rows(self.key, study=self.study)
        seeds = self.found.loc[self.found["key"] == self.key, "seed"]
        self._fill(self.order, [(f"seed {seed}", seed) for seed in seeds], self.seed)
        self._steps()

    def _steps(self) -> None:
        self._filling = True
        self.slider.max = int(self.rows.loc[self.rows["seed"] == self.seed, "n_edits"].max())
        self._filling = False
        self._show()

    def _show(self) -> None:
        of_order = self.rows[self.rows["seed"] == self.seed].reset_index(drop=True)
        self.said.value = _step_in_words(of_order, self.step)
        with paper_style():
            figure = Figure(figsize=(4.6, 2.9), layout="constrained")
            sequence_step(self.rows, figure.add_subplot(), self.seed, self.step)
            about = self.found[(self.found["key"] == self.key) & (self.found["seed"] == self.seed)].iloc[0]
            before, after = (fragments.shown(float(about[name])) for name in ("before", "after"))
            alt = (
                f"Perplexity against the number of edits, from {before} without any to {after} after "
                f"{about['n_edits']}; step {self.step} is marked."
            )
            self.drawing.value = fragments.figure(figure, alt)


def sequences(study: str = SEQUENTIAL) -> SequenceView:
    """Stored sequences of edits, step by step: see SequenceView."""
    return SequenceView(study)


def _words(found: pd.DataFrame) -> list[tuple[str, str]]:
    """Each key by its words; where two have the same, as when a hyper-parameter differs, the key stands behind."""
    named = {}
    for key, orders in found.groupby("key", sort=False):
        first = orders.iloc[0]
        how = [first["method"], *([f"{first['key_mode']} keys"] if first["key_mode"] else [])]
        how += [f"layer {first['layer']}"] if first["layer"] else []
        words = f"{first['model']}: {', '.join(how)}; {first['n_edits']} edits ({first['subjects']} subjects)"
        named[key] = f"{words}, {first['stored'][:10]}"
    twice = [words for words in named.values() if list(named.values()).count(words) > 1]
    return [(f"{words} [{key[:6]}]" if words in twice else words, key) for key, words in named.items()]


def _step_in_words(rows: pd.DataFrame, step: int) -> str:
    row = rows[rows["n_edits"] == step].iloc[0]
    values, scores = step_values(rows, step), step_scores(rows, step)
    if step == 0:
        what = "<b>The unedited model</b>"
    elif "n_requests" in row and pd.notna(row["n_requests"]):
        first = step - int(row["n_requests"]) + 1
        what = f"<b>Edits {first} to {step}</b>, at once: cases {escape(str(row['case_id']))}"
    else:
        was = f" instead of <b>{escape(row['target_true'])}</b>" if isinstance(row["target_true"], str) else ""
        text = row["prompt"].replace("{}", row["subject"])
        what = (
            f"<b>Edit {step}</b>: case {escape(str(row['case_id']))}, {escape(row['subject_kind'])}"
            f"<div>{escape(text)} → <b>{escape(row['target_new'])}</b>{was}</div>"
        )
    unmeasured = "" if row["checkpoint"] else fragments.note("Perplexity and all edits so far were not measured here.")
    measured = pd.DataFrame({"value": values.values()}, index=[NAMES.get(name, name) for name in values])
    table = fragments.table(measured, "The model and the edit")
    scores = scores.dropna(axis=1, how="all")
    success = fragments.table(scores, "Success, as shares from 0 to 1") if len(scores) else ""
    return f"<div>{what}</div>{unmeasured}{success}{table}"
