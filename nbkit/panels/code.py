"""The Python lines that do again what was done in the explorer.

code = Code("miniworld-gpt2", "miniworld", "miniworld", 50)
code.edit(request, settings, n_applied=0)
code.apply()
print(code)
"""

from collections.abc import Mapping
from typing import Any

from nbkit.panels.settings import Settings
from nbkit.records.requests import EditRequest


class Code:
    """A script that grows with each thing done; `str(code)` is all of it."""

    def __init__(self, model: str, data: str | None, texts: str, n_texts: int):
        self.data = data
        self.lines = [
            "import nbkit",
            "",
            f"lm = nbkit.load({model!r})",
            f"texts = nbkit.read_texts({texts!r}, limit={n_texts})",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines) + "\n"

    def edit(self, request: EditRequest, settings: Settings, n_applied: int, layers: tuple[int, ...]) -> None:
        """An edit, and what it does. layers: those that it changes, for C."""
        self._request(request)
        more = self._second_moment(settings, n_applied, layers)
        self.lines.append(f"[edit] = nbkit.edit(lm, [request], {_keywords(settings, more)})")
        if settings.regulariser:
            arguments = "".join(f", {name}={value!r}" for name, value in settings.regulariser_arguments.items())
            self.lines.append(f"edit = nbkit.regularise(edit, lm, {settings.regulariser!r}{arguments})")
        self.lines += [
            "print(edit.info.get('numerator'), edit.info.get('signed_denominator'), edit.norm())",
            "with nbkit.applied(lm, edit):",
            "    print(nbkit.edit_metrics(lm, [request]).T, nbkit.perplexity(lm, texts))",
        ]

    def apply(self) -> None:
        self.lines.append("lm.apply(edit)")

    def undo(self, n: int) -> None:
        self.lines.append(f"lm.undo({n})")

    def sweep(self, request: EditRequest, settings: Settings, n_applied: int, layers: tuple[int, ...]) -> None:
        """A sweep over layers."""
        self._request(request)
        more = self._second_moment(settings, n_applied, layers)
        hparams = {name: value for name, value in settings.hparams.items() if name not in ("layer", "layers")}
        keywords = _keywords(Settings(settings.method, hparams), more)
        self.lines += [
            f"rows = list(nbkit.layer_sweep(lm, request, texts, layers={list(layers)}, {keywords}))",
            "print(*rows, sep='\\n')",
        ]

    def _request(self, request: EditRequest) -> None:
        if self.data is not None and request.case_id is not None:
            found = f"next(one for one in nbkit.read_requests({self.data!r}) if one.case_id == {request.case_id!r})"
        else:
            given = {name: getattr(request, name) for name in ("prompt", "subject", "target_new", "target_true")}
            found = f"nbkit.EditRequest({', '.join(f'{name}={value!r}' for name, value in given.items() if value)})"
        self.lines += ["", f"request = {found}"]

    def _second_moment(self, settings: Settings, n_applied: int, layers: tuple[int, ...]) -> Mapping[str, str]:
        if not settings.with_second_moment:
            return {}
        texts, tokens = settings.second_moment_texts, settings.second_moment_tokens
        line = f"C = nbkit.second_moments(lm, {list(layers)}, nbkit.read_texts({texts!r}), {tokens})"
        self.lines += ["with nbkit.unedited(lm):", f"    {line}"] if n_applied else [line]
        return {"second_moment": "C"}


def _keywords(settings: Settings, more: Mapping[str, Any]) -> str:
    given = {"method": repr(settings.method), **more}
    given |= {name: repr(value) for name, value in settings.hparams.items()}
    return ", ".join(f"{name}={value}" for name, value in given.items())
