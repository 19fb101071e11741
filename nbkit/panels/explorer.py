"""The workbook of one edit: choose a model and a request, edit it, see what that did, pin, stack, sweep, and undo.

    explorer = nbkit.panels.explore("miniworld-gpt2", data="miniworld")
    explorer                                 # the last line of a cell shows it

What its buttons do is `nbkit.one_edit`, `lm.apply`, `lm.undo` and `nbkit.layer_sweep`; "Code" shows the lines that do
the same without it. `explorer.lm` and `explorer.outcome` are there for other cells.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ipywidgets import Button, Combobox, HBox, IntProgress, Layout, Text, VBox
from tqdm.auto import tqdm

from nbkit.errors import NbkitError, RequestError
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import load
from nbkit.panels import fragments
from nbkit.panels.code import Code
from nbkit.panels.jobs import Cancelled, Job, jobs_of
from nbkit.panels.key_map import KeyMap
from nbkit.panels.ledger_view import LedgerView
from nbkit.panels.request_browser import requests as browse
from nbkit.panels.settings import Settings, SettingsForm
from nbkit.panels.sweeps import layers_in
from nbkit.panels.views import Views
from nbkit.records import embedded
from nbkit.records.requests import EditRequest, read_requests, read_texts
from nbkit.studies.layer_sweep import layer_sweep
from nbkit.studies.one_edit import Outcome, one_edit

ENDS = {model: "\n" for model in embedded.MODELS}  # of what models say whose texts follow each other line by line
ROW = Layout(flex_flow="row wrap", align_items="center", grid_gap="4px")


def explore(
    model: LanguageModel | str = "miniworld-gpt2",
    data: str | Sequence[EditRequest] = "miniworld",
    texts: str = "miniworld",
    n_texts: int = 50,
    n_requests: int | None = 1000,
    choose: EditRequest | int | str | None = None,
    **hparams: Any,
) -> "Explorer":
    """The explorer of a model.

    Args:
        data: a name, a file, or requests. n_requests: at most so many of a file are listed, the first; None: all. The
            risk of each is computed before the widget is there.
        texts, n_texts: the held-out texts that perplexity is measured on.
        choose: the request to begin with, or the case_id of one that is listed.
        hparams: `method` and hyper-parameters that the form begins with.
    """
    lm = load(model) if isinstance(model, str) else model
    return Explorer(lm, data, texts, n_texts, n_requests, choose, **hparams)


class Explorer(VBox):
    """The widget. `lm` is the model it edits, `outcome` the last edit, `pinned` those kept to compare."""

    def __init__(self, lm: LanguageModel, data, texts: str, n_texts: int, n_requests, choose=None, **hparams: Any):
        super().__init__()
        self.texts_name, self.n_texts, self.n_requests, self._hparams = texts, n_texts, n_requests, hparams
        known = [*embedded.MODELS, *embedded.cached_models()]
        self.model_name = Combobox(value=lm.name, options=known, ensure_option=False, description="Model")
        self.data_name = Text(value=data if isinstance(data, str) else "", description="Requests")
        self.texts_field = Text(value=texts, description="Texts")
        self.load_button = _button("Load", "load this model, these requests and texts", self.load)
        self.edit_button = _button("Edit", "edit the request into the model, and look", self.edit, "primary")
        self.keep_button = _button("Keep in the model", "apply the edit; the next comes on top", self.keep)
        self.pin_button = _button("Pin", "keep this outcome to compare with the next", self.pin)
        self.unpin_button = _button("Unpin all", "forget the pinned outcomes", self.unpin)
        self.risk_button = _button("Risk for these settings", "compute the table's risk anew", self.risk)
        self.sweep_button = _button("Sweep over layers", "edit the request into each layer in turn", self.sweep)
        self.sweep_layers = Text(description="layers", placeholder="all", layout=Layout(width="14em"))
        self.cancel_button = _button("Cancel", "stop at the next step", lambda: self.jobs.cancel(), "warning")
        self.progress = IntProgress(min=0, max=1, layout=Layout(width="12em"))
        self.state, self.words, self.status = fragments.html(), fragments.html(), fragments.html()
        self._fill(lm, data, read_texts(texts, limit=n_texts), choose)

    def _fill(self, lm: LanguageModel, data, texts: Sequence[str], choose=None, risk: bool = True) -> None:
        """All that hangs on the model and the requests. risk: whether it is computed before the widget is there."""
        form = SettingsForm(lm, **self._hparams)
        requests = read_requests(data, limit=self.n_requests) if isinstance(data, str) else data
        browser = browse(lm, requests, **form.read_or_default().of_risk, risk=risk)
        browser.again.layout.display = "none"  # of it there is one with this form's settings
        if isinstance(choose, EditRequest):
            browser.accept(choose)
        elif choose is not None:
            browser.choose(choose)
        self.lm, self.data, self.texts, self.settings, self.browser = lm, data, texts, form, browser
        self.key_map = KeyMap(lm, browser.requests)
        self.outcome: Outcome | None = None
        self._n_kept = lm.n_applied
        self.pinned: dict[str, Outcome] = {}
        self.rows: list[dict[str, Any]] = []
        self.code = Code(lm.name, data if isinstance(data, str) else None, self.texts_name, self.n_texts)
        self.ledger = LedgerView(lm)
        self.ledger.on_change(self._after_undo)
        self.views = Views(self.ledger)
        self.views.show_code(self.code)
        self.jobs = jobs_of(lm)
        self.jobs.watch(self._show_job)
        self.children = [
            fragments.html(fragments.STYLE),
            HBox([self.model_name, self.data_name, self.texts_field, self.load_button], layout=ROW),
            self.state,
            browser,
            form,
            HBox(
                [self.edit_button, self.keep_button, self.pin_button, self.unpin_button, self.risk_button], layout=ROW
            ),
            HBox([self.sweep_button, self.sweep_layers, self.cancel_button, self.progress, self.status], layout=ROW),
            self.words,
            self.views,
        ]
        self._show_job(None)
        self._show_state()

    def load(self) -> None:
        """Loads what the three fields name, in place of what is there."""
        name, data, texts = self.model_name.value, self.data_name.value or self.data, self.texts_field.value

        def work(_step):
            return self.lm if name == self.lm.name else load(name), read_texts(texts, limit=self.n_texts)

        def show(found):
            self.texts_name, self._hparams = texts, {}
            self._fill(found[0], data, found[1], risk=False)
            self.browser.refresh()

        self._start(f"loading {name}", work, show)

    def edit(self) -> None:
        """The edit of the chosen request with the form's settings, and all it did; the model stays as it is."""
        asked = self._asked()
        if asked is None:
            return
        settings, request = asked

        def work(step):
            found = one_edit(
                self.lm,
                request,
                self.texts,
                settings.method,
                second_moment=settings.second_moment(self.lm),
                regulariser=settings.regulariser,
                regulariser_arguments=settings.regulariser_arguments,
                end=ENDS.get(self.lm.known_as),
                step=step,
                **settings.hparams,
            )
            layers = settings.layers(self.lm)
            return found, self.key_map.frame(request, layers[0]) if layers else None

        def show(found):
            self.outcome, among = found
            self._title = settings.title
            self.code.edit(request, settings, self.outcome.n_before, settings.layers(self.lm))
            self.views.show_outcome(self.outcome, settings.title, among)
            self.views.show_code(self.code)
            self.views.choose("Outcome")

        self._start(f"{settings.title}: {request.subject}", work, show)

    def keep(self) -> None:
        """Applies the last outcome's edit, where it stays until it is undone."""
        if self.outcome is None:
            return self._say(RequestError("there is no edit yet to keep in the model: press Edit first"))
        made = self.outcome.edit
        if any(made is one for one in self.lm.ledger.edits):
            return self._say(RequestError("this edit is in the model already: press Edit for another"))
        if self.outcome.n_before != self.lm.n_applied:
            return self._say(
                RequestError("the model is not the one that this edit was made for any more: press Edit anew")
            )

        def show(_found):
            self.code.apply()
            self._n_kept = self.lm.n_applied
            self.ledger.refresh()
            self.views.show_code(self.code)
            self.views.choose("Ledger")
            self._show_state()

        self._start("keeping the edit", lambda step: self.lm.apply(made), show)

    def pin(self) -> None:
        """Keeps the last outcome, to be shown beside others."""
        if self.outcome is None:
            return self._say(RequestError("there is no edit yet to pin: press Edit first"))
        if not any(self.outcome is one for one in self.pinned.values()):
            self.pinned[f"{len(self.pinned) + 1}. {self._title}"] = self.outcome
        self.views.show_pinned(self.pinned)
        self.views.choose("Compare")

    def unpin(self) -> None:
        """Forgets the pinned outcomes."""
        self.pinned = {}
        self.views.show_pinned(self.pinned)

    def risk(self) -> None:
        """Computes the risk of all requests for the form's settings."""
        try:
            settings = self.settings.read()
        except NbkitError as error:
            return self._say(error)

        def work(_step):
            return settings.second_moment(self.lm) if settings.method == "rome" else None

        def show(moments):
            self.browser.refresh(**settings.of_risk, second_moment=moments)

        self._start("the second moment", work, show)

    def sweep(self) -> None:
        """Edits the request into each layer in turn; rows are shown as they come, and stay if it is cancelled."""
        asked = self._asked()
        if asked is None:
            return
        settings, request = asked
        try:
            layers = layers_in(self.sweep_layers.value, self.lm)
        except NbkitError as error:
            return self._say(error)
        hparams = {name: value for name, value in settings.hparams.items() if name not in ("layer", "layers")}
        rows: list[dict[str, Any]] = []

        def work(step):
            step(0, len(layers))
            moments = settings.second_moment(self.lm, layers)
            swept = layer_sweep(self.lm, request, self.texts, layers, settings.method, second_moment=moments, **hparams)
            for row in swept:
                rows.append(row)
                step(len(rows), len(layers))

        if self._start(f"layers of {request.subject}", work, lambda _: self.views.show_layers(rows)):
            self.rows = rows
            self.code.sweep(request, settings, self.lm.n_applied, tuple(layers))
            self.views.show_code(self.code)
            self.views.show_layers(rows)
            self.views.choose("Layers")

    def _asked(self) -> tuple[Settings, EditRequest] | None:
        """What is to be edited and how; None, and words, where that cannot be read."""
        try:
            settings, request = self.settings.read(), self.browser.request
            if request is None:
                raise RequestError("choose a request in the table, or write one of your own below it")
            return settings, request
        except NbkitError as error:
            return self._say(error)

    def _start(self, name: str, work: Callable, show: Callable) -> bool:
        def shown(found):
            self.words.value = ""  # what was said meanwhile, that this was running
            show(found)

        self.words.value = ""
        began = self.jobs.start(name, work, shown, self._say)
        if not began:
            running = self.jobs.current
            what = f"“{running.name}” is" if running else "other work was"
            self.words.value = fragments.note(f"One thing at a time: {what} running. Wait, or press Cancel.")
        return began

    def _say(self, error: BaseException) -> None:
        cancelled = isinstance(error, Cancelled)
        self.words.value = fragments.note(f"{error}. The model is as it was.") if cancelled else fragments.error(error)
        self._show_state()

    def _show_job(self, job: Job | None) -> None:
        busy = job is not None
        for button in (self.load_button, self.edit_button, self.keep_button, self.sweep_button, self.risk_button):
            button.disabled = busy
        self.cancel_button.disabled = not busy
        self.progress.max = max(job.n_total, 1) if busy else 1
        self.progress.value = job.n_done if busy else 0
        if not busy:
            self.status.value = fragments.note("Ready.")
            return
        left = f", {tqdm.format_interval(job.seconds_left)} left" if job.seconds_left is not None else ""
        count = f": {job.n_done} of {job.n_total}" if job.n_total else ""
        within = f" ({job.within})" if job.within else ""
        self.status.value = fragments.note(f"{job.name}{count}{left}{within}")
        if self.rows and job.name.startswith("layers of") and not job.within:  # a layer more is done
            self.views.show_layers(self.rows)

    def _show_state(self) -> None:
        if self.jobs.current is not None:  # at its end the state is shown again
            return
        n = self.lm.n_applied
        carries = f"carries {n} edit{'s' * (n > 1)}" if n else "unedited"
        shape = f"{self.lm.n_layers} layers, {self.lm.d_model} wide, keys of {self.lm.d_mlp}, {self.lm.dtype}"
        text = f"{self.lm.title} ({shape}): {carries}; hash {self.lm.hash[:12]}"
        self.state.value = f'<div role="status" class="nbkit-state">{fragments.escape(text)}</div>'

    def _after_undo(self) -> None:
        if self._n_kept > self.lm.n_applied:  # less, if other cells applied edits meanwhile
            self.code.undo(self._n_kept - self.lm.n_applied)
            self.views.show_code(self.code)
        self._n_kept = self.lm.n_applied
        self._show_state()


def _button(text: str, tooltip: str, do: Callable[[], Any], style: str = "") -> Button:
    button = Button(description=text, tooltip=tooltip, button_style=style, layout=Layout(width="auto"))
    button.on_click(lambda _: do())
    return button
