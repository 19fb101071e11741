"""Requests in a table with their collapse risk, from which one is chosen, or one of one's own is written.

    browser = requests(lm, "miniworld")         # a widget: the last line of a cell shows it
    browser.choose(1163)
    browser.request                             # the EditRequest chosen; observe(..., "request") tells of others
    browser.frame                               # what the table shows, as a DataFrame

The view of `nbkit.collapse_risk`, `studies.risk.risk_in_words` and `plots.risk_distribution`.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import traitlets
from ipywidgets import Button, Combobox, HBox, IntProgress, Layout, VBox
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from nbkit.errors import NbkitError, RequestError
from nbkit.methods.verbs import SecondMomentLike, as_templates
from nbkit.models.language_model import LanguageModel, check_model
from nbkit.models.prompts import request_columns, shown_tokens
from nbkit.panels import fragments
from nbkit.panels.jobs import Job, jobs_of
from nbkit.panels.request_form import RequestForm
from nbkit.panels.request_table import STYLE, RequestTable, described
from nbkit.plots import paper_style, risk_distribution
from nbkit.records.bounds import nearest
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest, read_requests
from nbkit.studies.risk import MEASURED, collapse_risk, risk_in_words

JOB = "collapse risk"
AT_ONCE = 100  # requests between two steps of the progress bar
SAME: Any = object()  # a setting that stays what it is


class RequestBrowser(VBox):
    """A table of requests and the one that is chosen, `request`.

    Args:
        data: a name or a file, as `read_requests` takes it, or EditRequests.
        layer, key_mode, second_moment, context_templates: of the edits that the risk is about, as in `nbkit.edit`.
        risk: whether to compute the risk of all requests here, with a progress bar, before the widget is there: some
            10 ms each with the embedded model. So the cells below find it done and the model free, in JupyterLab as
            under papermill. Without, the button and `refresh` compute it.

    Raises what `read_requests` and `collapse_risk` raise.
    """

    request = traitlets.Instance(EditRequest, allow_none=True, help="the request that is chosen")

    def __init__(
        self,
        lm: LanguageModel,
        data: str | Path | Sequence[EditRequest] = "miniworld",
        layer: int | None = None,
        key_mode: str = "mixed",
        second_moment: SecondMomentLike = None,
        context_templates: Sequence[str] | None = None,
        risk: bool = True,
    ):
        self.lm, self.jobs = check_model(lm), jobs_of(lm)
        self.requests = read_requests(data) if isinstance(data, str | Path) else as_requests(data)
        if not self.requests:
            raise RequestError("there is no request to choose from")
        self.settings = {"layer": layer, "key_mode": key_mode}
        self.settings |= {"second_moment": second_moment, "context_templates": context_templates}
        self._own: tuple[EditRequest, float] | None = None
        self.frame = described(lm, self.requests)
        self.table = RequestTable(self.frame)
        self._lay_out()
        super().__init__(self._parts, layout=Layout(width="100%", max_width="1200px"))
        self.table.observe(lambda change: self._select(change["new"]), "selected_rows")
        self.observe(lambda change: self._chosen(), "request")
        self.jobs.watch(self._follow)
        if risk:
            with tqdm(total=len(self.requests), desc=JOB, unit="request") as bar:
                self._measured(self._work(self.settings)(lambda n_done, n_total: bar.update(n_done - bar.n)))
        else:
            self._tell_choice()

    def choose(self, case_id: int | str) -> None:
        """Chooses a request of the table; RequestError, with the nearest ones, for a case that is not there."""
        cases = self.frame["case_id"].tolist()
        if str(case_id) not in cases:
            raise RequestError(f"there is no case {str(case_id)!r} in this table{nearest(str(case_id), cases)}")
        self.request = self.requests[cases.index(str(case_id))]

    def accept(self, request: EditRequest) -> None:
        """Chooses a request of one's own; PromptError, and the choice stays, for one that the model cannot read."""
        shown_tokens(self.lm, request)
        self.request = request

    def refresh(
        self,
        layer: int | None = SAME,
        key_mode: str = SAME,
        second_moment: SecondMomentLike = SAME,
        context_templates: Sequence[str] | None = SAME,
    ) -> bool:
        """Computes the risk for other settings, as a job of the model; what is not given stays as it is.

        Returns whether it began: while another job of the model runs it does not, and says so. Settings that are
        refused are told in words, and the table keeps what it shows.
        """
        given = {"layer": layer, "key_mode": key_mode}
        given |= {"second_moment": second_moment, "context_templates": context_templates}
        settings = self.settings | {name: value for name, value in given.items() if value is not SAME}
        began = self.jobs.start(JOB, self._work(settings), self._measured, self._failed)
        if not began:
            current = self.jobs.current
            what = f"“{current.name}” is" if current else "another job was"
            self.notice.value = fragments.note(
                f"The risk is not computed: {what} at work on the model. Try again then."
            )
        return began

    @property
    def risk(self) -> float:
        """The collapse risk of the request chosen; NaN while there is none."""
        place = self._place()
        if place is not None:
            return float(self.frame["risk"].iloc[place])
        return float("nan") if self._own is None else self._own[1]

    def _work(self, settings: dict[str, Any]) -> Callable:
        """What computes the risk of all, step by step: a frame, and the settings that it is about."""

        def work(step: Callable[[int, int], None]) -> tuple[pd.DataFrame, dict[str, Any]]:
            n, parts = len(self.requests), []
            step(0, n)
            used = {**settings, "context_templates": as_templates(self.lm, settings["context_templates"])}
            for first in range(0, n, AT_ONCE):
                parts.append(collapse_risk(self.lm, self.requests[first : first + AT_ONCE], **used))
                step(min(first + AT_ONCE, n), n)
            return pd.concat(parts, ignore_index=True), used

        return work

    def _measured(self, found: tuple[pd.DataFrame, dict[str, Any]]) -> None:
        measured, self.settings = found
        self.frame = self.frame.assign(**{name: measured[name] for name in ["layer", "key_mode", *MEASURED]})
        self._own = None
        self.table.show(self.frame)
        self.notice.value = ""
        self._chosen()

    def _failed(self, error: BaseException) -> None:
        self.notice.value = fragments.error(error)

    def _select(self, rows: list[int]) -> None:
        if rows:  # a second click on the row takes the mark away, and not the choice
            self.request = self.requests[rows[0]]

    def _place(self) -> int | None:
        """Where the chosen request stands in the table; None for one's own."""
        return self.requests.index(self.request) if self.request in self.requests else None

    def _chosen(self) -> None:
        place = self._place()
        self.table.selected_rows = [] if place is None else [place]
        said = fragments.error(error) if (error := self._measure_own(place)) else ""
        self._tell_choice(said)

    def _measure_own(self, place: int | None) -> NbkitError | None:
        """The risk of a request of one's own: one short pass, at once, where the others have theirs."""
        if self._own is not None and self._own[0] != self.request:
            self._own = None
        known = place is not None or self._own is not None
        if self.request is None or known or self.frame["risk"].isna().all():
            return None
        try:
            self.jobs.check_free()
            self._own = self.request, float(collapse_risk(self.lm, [self.request], **self.settings)["risk"].iloc[0])
        except NbkitError as error:  # as while a job is at work on the model
            return error
        return None

    def _tell_choice(self, problem: str = "") -> None:
        self.words.value = problem + self._choice()
        self.drawing.value = self._drawn()

    def _choice(self) -> str:
        request = self.request
        if request is None:
            return fragments.note(
                "Choose a request: click a row of the table, type a case above it, or write your own."
            )
        row, of_subject = shown_tokens(self.lm, request)
        was = f" instead of <b>{escape(request.target_true)}</b>" if request.target_true else ""
        case = "a request of your own" if request.case_id is None else f"case {escape(str(request.case_id))}"
        return (
            f"<div><b>Chosen</b>: {case}, {escape(request_columns(self.lm, request)['subject_kind'])}</div>"
            f"<div>{escape(request.text)} → <b>{escape(request.target_new)}</b>{was}</div>"
            f'<div style="margin: 5px 0">{fragments.tokens(row, of_subject, of_subject[-1])}</div>'
            "<div>Filled: the subject's tokens; framed: its last, where the edit acts.</div>"
            f"{fragments.note(self._risk_words())}"
        )

    def _risk_words(self) -> str:
        own = self._place() is None and self._own is None
        if own or self.frame["risk"].isna().all():
            return "Its collapse risk is not computed yet."
        layer, key_mode = self.frame[["layer", "key_mode"]].iloc[0]
        where = risk_in_words(self.risk, self.frame["risk"])
        return f"Collapse risk {fragments.shown(self.risk)} (layer {layer}, keys {key_mode}): {where}."

    def _drawn(self) -> str:
        if self.frame["risk"].isna().all():
            return ""
        with paper_style():
            figure = Figure(figsize=(4.6, 2.5), layout="constrained")
            risk_distribution(self.frame, figure.add_subplot(), self.risk)
            low, middle, high = self.frame["risk"].quantile([0, 0.5, 1])
            alt = (
                f"Collapse risks of {len(self.frame)} requests by the kind of their subject: from {low:.3g} to "
                f"{high:.3g}, median {middle:.3g}. {self._risk_words() if self.request else 'None is chosen.'}"
            )
            return fragments.figure(figure, alt)

    def _lay_out(self) -> None:
        self.notice, self.words, self.drawing = fragments.html(), fragments.html(), fragments.html()
        self.again = Button(description="Compute the risk", layout=Layout(width="auto"))
        self.stop = Button(description="Stop", layout=Layout(width="auto", display="none"))
        self.bar = IntProgress(description=JOB, layout=Layout(display="none"), style={"description_width": "initial"})
        self.again.on_click(lambda _: self.refresh())
        self.stop.on_click(lambda _: self.jobs.cancel())
        self._labels = {
            f"{case} · {subject}": case
            for case, subject in zip(self.frame["case_id"], self.frame["subject"], strict=True)
        }
        self.go = Combobox(
            options=list(self._labels),
            description="Go to case",
            placeholder="a case or a subject, then Enter",
            continuous_update=False,
            style={"description_width": "initial"},
            layout=Layout(width="340px"),
        )
        self.go.observe(lambda change: self._go(change["new"].strip()), "value")
        self.form = RequestForm(self.accept, lambda: self.request)
        wide, half = Layout(flex_flow="row wrap", align_items="center"), Layout(flex="1 1 380px", min_width="0")
        self.drawing.layout, self.words.layout = half, half
        beside = Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="4px 24px")
        self._parts = [
            fragments.html(fragments.STYLE + STYLE),
            HBox([self.go, self.again, self.bar, self.stop], layout=wide),
            self.notice,
            self.table,
            HBox([self.words, self.drawing], layout=beside),
            self.form,
        ]

    def _go(self, said: str) -> None:
        if not said:
            return
        subjects = self.frame["subject"].tolist()
        case = self._labels.get(said, said)
        if case not in set(self.frame["case_id"]) and said in subjects:
            case = self.frame["case_id"].iloc[subjects.index(said)]
        try:
            self.choose(case)
            self.notice.value = ""
        except RequestError as error:
            self.notice.value = fragments.error(error)

    def _follow(self, job: Job | None) -> None:
        mine = job is not None and job.name == JOB
        self.bar.layout.display = self.stop.layout.display = None if mine else "none"
        self.again.disabled = mine
        if mine:
            self.bar.max, self.bar.value = max(job.n_total, 1), job.n_done


requests = RequestBrowser  # as it is called where it is used
