"""The form of an edit: the method, where it acts, with which keys and C, its hyper-parameters, and a regulariser.

form = SettingsForm(lm)
form.read()                             # Settings, or the MethodError that says which field cannot be read
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, get_origin

from ipywidgets import Checkbox, Dropdown, HBox, Layout, Text, ToggleButton, VBox, Widget

from nbkit import paths
from nbkit.edits.overlays import unedited
from nbkit.edits.regularisers import REGULARISERS
from nbkit.errors import MethodError, NbkitError
from nbkit.keys.moments import second_moments
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.rome import KEY_MODES
from nbkit.methods.table import METHODS
from nbkit.models.language_model import LanguageModel
from nbkit.panels import fragments
from nbkit.records import embedded
from nbkit.records.bounds import check_choice
from nbkit.records.requests import read_texts

IN_WORDS = {
    "ft": "FT: fine-tuning of one projection",
    "kn": "KN: knowledge neurons",
    "mend": "MEND: a trained hypernetwork",
    "rome": "ROME, C-ROME or p-ROME",
    "memit": "MEMIT",
    "emmet": "EMMET",
    "alphaedit": "AlphaEdit",
    "encore": "ENCORE",
    "ultraedit": "UltraEdit",
    "locft-bf": "LocFT-BF: fine-tuning, breadth first",
}
KEYS_IN_WORDS = {"mixed": "ROME (mixed)", "prefixed": "C-ROME (prefixed)", "plain": "p-ROME (plain)"}
WIDE = {"description_width": "7.5em"}
NO_REGULARISER = "none"


@dataclass(frozen=True)
class Settings:
    """What a form says. hparams: those that are not the model's defaults."""

    method: str = "rome"
    hparams: Mapping[str, Any] = field(default_factory=dict)
    with_second_moment: bool = False
    second_moment_texts: str = ""
    second_moment_tokens: int = 0
    regulariser: str | None = None
    regulariser_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """A short name: "C-ROME, layer 1, with C, rect"."""
        mode = self.hparams.get("key_mode")
        parts = [KEYS_IN_WORDS[mode].split(" ")[0] if mode else self.method.upper()]
        parts += [f"{name} {value}" for name, value in self.hparams.items() if name != "key_mode"]
        parts += ["with C"] * self.with_second_moment
        parts += [self.regulariser] if self.regulariser else []
        return ", ".join(parts)

    def layers(self, lm: LanguageModel) -> tuple[int, ...]:
        """Those that an edit changes; none for a method that is given none."""
        return tuple(getattr(hyper_parameters(lm, self.method, **self.hparams), "layers", ()))

    @property
    def of_risk(self) -> dict[str, Any]:
        """What `collapse_risk` is asked, without C: for another method than ROME, the risk of ROME's defaults."""
        asked = {"layer": None, "key_mode": "mixed"}
        return {name: self.hparams.get(name, asked[name]) for name in asked} if self.method == "rome" else asked

    def second_moment(self, lm: LanguageModel, layers: Sequence[int] | None = None):
        """{layer: C} of the unedited model over the texts named, found in the cache or put there; None without C."""
        if not self.with_second_moment:
            return None
        layers, texts = self.layers(lm) if layers is None else layers, read_texts(self.second_moment_texts)
        with unedited(lm):
            return second_moments(lm, layers, texts, self.second_moment_tokens, cache=paths.RUNS / "moments")


class SettingsForm(VBox):
    """The form. `read` says what is in it; `watch` tells of each change."""

    def __init__(self, lm: LanguageModel, method: str = "rome", **hparams: Any):
        self.lm, self._watchers = lm, []
        self._given = {name: value for name, value in hparams.items() if value is not None}
        world = embedded.MODELS.get(lm.known_as)
        texts = f"{world}-training" if world else ""
        options = [(IN_WORDS.get(name, name), name) for name in METHODS]
        self.method = Dropdown(
            options=options, value=method, description="Method", style=WIDE, layout=Layout(width="24em")
        )
        self.layer = Text(description="Layer", style=WIDE, layout=Layout(width="13em"), continuous_update=False)
        self.key_mode = Dropdown(
            options=[(KEYS_IN_WORDS[mode], mode) for mode in KEY_MODES], description="Keys", style=WIDE
        )
        self.with_second_moment = Checkbox(description="with C, the keys' second moment", indent=False)
        self.second_moment_texts = Text(value=texts, description="C's text", style=WIDE, continuous_update=False)
        self.second_moment_tokens = Text(
            value="100000", description="C's tokens", style=WIDE, layout=Layout(width="15em"), continuous_update=False
        )
        choices = [NO_REGULARISER, *REGULARISERS]
        self.regulariser = Dropdown(options=choices, value=NO_REGULARISER, description="Regulariser", style=WIDE)
        self.more = ToggleButton(description="Hyper-parameters", tooltip="show or hide them")
        self.fields: dict[str, Widget] = {}
        self.arguments: dict[str, Widget] = {}
        self._fields, self._arguments, self.words = VBox(), HBox(), fragments.html()
        self._about_method, self._of_second_moment = fragments.html(), HBox()
        super().__init__()
        self.children = [
            HBox([self.method, self.layer, self.key_mode], layout=Layout(flex_flow="row wrap")),
            HBox([self.with_second_moment, self._of_second_moment], layout=Layout(flex_flow="row wrap")),
            HBox([self.regulariser, self._arguments, self.more], layout=Layout(flex_flow="row wrap")),
            self._fields,
            self.words,
        ]
        self.method.observe(self._show_method, "value")
        self.regulariser.observe(self._show_regulariser, "value")
        for widget, show in ((self.more, self._show_fields), (self.with_second_moment, self._show_second_moment)):
            widget.observe(show, "value")
        for widget in (self.layer, self.key_mode, self.with_second_moment, self.second_moment_texts):
            widget.observe(self._changed, "value")
        self._show_method()

    def watch(self, watcher) -> None:
        """Calls `watcher()` when what the risk of an edit hangs on has changed."""
        self._watchers.append(watcher)

    def read(self) -> Settings:
        """The settings; MethodError, which names the field, where one cannot be read."""
        method, kind = self.method.value, METHODS[self.method.value].parameters
        hparams = {}
        for each in dataclasses.fields(kind):
            widget = self._widget_of(each.name)
            value = widget.value
            if isinstance(value, str) and not widget.value.strip():
                continue  # the default, or the error that says there is none
            hparams[each.name] = _read(each.name, value, each.type)
        parameters = hyper_parameters(self.lm, method, **hparams)
        own, _, _ = self._defaults(method)
        changed = {name: getattr(parameters, name) for name in hparams if getattr(parameters, name) != own.get(name)}
        if "key_mode" in hparams:
            changed = {"key_mode": hparams["key_mode"], **changed}
        settings = Settings(method, changed)
        if self.with_second_moment.value and METHODS[method].takes_second_moment:
            tokens = _read("C's tokens", self.second_moment_tokens.value, int)
            texts = self.second_moment_texts.value
            settings = Settings(method, changed, True, texts, tokens)
        if self.regulariser.value == NO_REGULARISER:
            return settings
        arguments = {
            name: _read(name, widget.value, float if default is None else type(default))
            for name, (default, widget) in self.arguments.items()
            if widget.value.strip()
        }
        return dataclasses.replace(settings, regulariser=self.regulariser.value, regulariser_arguments=arguments)

    def read_or_default(self) -> Settings:
        """What `read` gives; the method's defaults where a field cannot be read."""
        try:
            return self.read()
        except NbkitError:
            return Settings(self.method.value)

    def _widget_of(self, name: str) -> Widget:
        return {"layer": self.layer, "layers": self.layer, "key_mode": self.key_mode}.get(name) or self.fields[name]

    def _defaults(self, method: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """The model's own, what the form begins with, and what is to be said where the model has none of its own."""
        try:
            own = dataclasses.asdict(hyper_parameters(self.lm, method))
            return own, own, ""
        except NbkitError as error:
            words = fragments.error(error)
        names = {each.name for each in dataclasses.fields(METHODS[method].parameters)} & {"layer", "layers"}
        try:
            first = dataclasses.asdict(hyper_parameters(self.lm, method, **dict.fromkeys(names, "auto")))
        except NbkitError:
            return {}, {}, words
        where = ", ".join(_text(first[name]) for name in names)
        about = f"{self.lm.title} has no layer of its own for {method}: {where} lies as deep as that of the published"
        return {}, first, fragments.note(f"{about} model nearest in depth, a first choice and no more.")

    def _show_method(self, _change=None) -> None:
        method, kind = self.method.value, METHODS[self.method.value].parameters
        _, shown, self.words.value = self._defaults(method)
        shown = {**shown, **{name: value for name, value in self._given.items() if name in shown}}
        names = [each.name for each in dataclasses.fields(kind)]
        self.key_mode.disabled = "key_mode" not in names
        self.layer.disabled = not {"layer", "layers"} & set(names)
        self.layer.description = "Layers" if "layers" in names else "Layer"
        self.layer.tooltip = f"0 to {self.lm.n_layers - 1}, set apart by commas" if "layers" in names else ""
        self.layer.value = _text(shown.get("layer", shown.get("layers", "")))
        if "key_mode" in names and shown.get("key_mode"):
            self.key_mode.value = shown["key_mode"]
        self.with_second_moment.disabled = not METHODS[method].takes_second_moment
        self.fields, rows = {}, []
        for each in dataclasses.fields(kind):
            if each.name in ("layer", "layers", "key_mode"):
                continue
            widget = _field(each, shown.get(each.name))
            self.fields[each.name] = widget
            rows.append(HBox([widget, fragments.html(escape(each.metadata.get("about", "")))]))
        self._rows = rows
        self._show_fields()
        self._show_second_moment()
        self._changed()

    def _show_fields(self, _change=None) -> None:
        self._fields.children = self._rows if self.more.value else []

    def _show_second_moment(self, _change=None) -> None:
        use = self.with_second_moment.value and not self.with_second_moment.disabled
        self._of_second_moment.children = [self.second_moment_texts, self.second_moment_tokens] if use else []

    def _show_regulariser(self, _change=None) -> None:
        self.arguments = {}
        if self.regulariser.value != NO_REGULARISER:
            for name, one in inspect.signature(REGULARISERS[self.regulariser.value]).parameters.items():
                if one.kind is one.KEYWORD_ONLY and name not in ("like", "second_moments"):
                    default = _STARTS.get(name) if one.default is one.empty else one.default
                    text = Text(value=_text(default), description=name, style=WIDE, layout=Layout(width="13em"))
                    self.arguments[name] = (default, text)
        self._arguments.children = [text for _, text in self.arguments.values()]

    def _changed(self, _change=None) -> None:
        for watcher in self._watchers:
            watcher()


# where a regulariser has no default; RECT's 40 %
_STARTS = {"keep": 0.4, "seed": 0, "n_components": 1, "kind": "gaussian"}


def _field(each: dataclasses.Field, value: Any) -> Widget:
    look = {"description": each.name, "style": {"description_width": "13em"}, "layout": Layout(width="24em")}
    if each.metadata.get("choices"):
        return Dropdown(options=list(each.metadata["choices"]), value=value, **look)
    if each.type is bool:
        return Checkbox(value=bool(value), **look)
    return Text(value=_text(value), continuous_update=False, **look)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _read(name: str, value: Any, kind: Any) -> Any:
    """A field's text as its type; MethodError where it is none."""
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        check_choice(name, value, ("True", "False"))
        return value == "True"
    try:
        if get_origin(kind) is tuple:
            return tuple(int(part) for part in value.split(","))
        return kind(value) if kind in (int, float) else value
    except ValueError:
        wanted = "whole numbers set apart by commas" if get_origin(kind) is tuple else f"{kind.__name__}"
        raise MethodError(f"{name} must be {_KINDS.get(wanted, wanted)}, not {value!r}") from None


_KINDS = {"int": "a whole number", "float": "a number"}
