"""Pieces of HTML that the panels show: texts, tokens, tables, errors, figures. All text is escaped.

Colours are those of JupyterLab's theme, light or dark, and nothing is said by colour alone.
"""

import base64
import difflib
import io
import math
import re
import traceback
from collections.abc import Sequence
from html import escape

import pandas as pd
from ipywidgets import HTML
from matplotlib.figure import Figure

from nbkit.errors import NbkitError

STYLE = """<style>
.nbkit-panel { font-size: var(--jp-ui-font-size1, 13px); line-height: 1.45; color: var(--jp-ui-font-color1, #212121);
  overflow-wrap: break-word; }
.nbkit-panel .widget-html-content { line-height: 1.45; }
.nbkit-panel table { border-collapse: collapse; margin: 4px 0; }
.nbkit-panel th, .nbkit-panel td { padding: 2px 8px; border-bottom: 1px solid var(--jp-border-color2, #bdbdbd);
  text-align: right; vertical-align: top; white-space: normal; }
.nbkit-panel th:first-child, .nbkit-panel td:first-child, .nbkit-panel .words { text-align: left; }
.nbkit-panel caption { text-align: left; font-weight: 600; padding: 6px 0 2px; }
.nbkit-panel pre { white-space: pre-wrap; margin: 2px 0; padding: 6px 8px; color: var(--jp-ui-font-color1, #212121);
  background: var(--jp-layout-color2, #eeeeee); }
.nbkit-token { border: 1px solid var(--jp-border-color1, #9e9e9e); border-radius: 3px; padding: 0 3px; margin: 0 1px;
  display: inline-block; white-space: pre; font-family: var(--jp-code-font-family, monospace); }
.nbkit-token.of-subject { background: var(--jp-layout-color3, #e0e0e0); font-weight: 600; }
.nbkit-token.last { outline: 2px solid #d55e00; outline-offset: 1px; }
.nbkit-error { border-left: 4px solid #d55e00; padding: 4px 8px; background: var(--jp-layout-color2, #eeeeee); }
.nbkit-note { color: var(--jp-ui-font-color1, #212121); padding: 2px 0; }
.nbkit-panel ins { text-decoration: underline 2px; font-weight: 600; }
.nbkit-panel del { text-decoration: line-through; }
.nbkit-panel img { max-width: 100%; background: #ffffff; padding: 4px; box-sizing: border-box; }
.nbkit-sides { display: flex; flex-wrap: wrap; gap: 4px 24px; }
.nbkit-sides > div { flex: 1 1 320px; min-width: 0; }
.nbkit-panel .widget-label, .nbkit-panel .widget-label-basic { color: var(--jp-ui-font-color1, #212121); }
.nbkit-panel :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 1px; }
</style>"""


def shown(value: object) -> str:
    """A value as people read it: four significant digits of a number, and NaN, infinity and None in words."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "infinite" if value > 0 else "−infinite"
        return f"{value:,.4g}".replace("-", "−", 1) if abs(value) < 1e6 else f"{value:.3e}"
    return str(value)


def table(frame: pd.DataFrame, caption: str = "", words: Sequence[str] = ()) -> str:
    """A table whose first column is its row names; `words` are columns to be set left."""
    classes = ["words" if name in words else "" for name in frame.columns]
    head = "".join(
        f'<th scope="col" class="{how}">{escape(str(name))}</th>' for name, how in zip(frame, classes, strict=True)
    )
    rows = []
    for name, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        cells = "".join(
            f'<td class="{how}">{escape(shown(value))}</td>' for value, how in zip(row, classes, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>')
    titled = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{titled}<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def tokens(row: Sequence[str], of_subject: Sequence[int] = (), last: int | None = None) -> str:
    """Tokens in boxes: those of the subject filled, its last one framed and named for who does not see the frame."""
    boxes = []
    for place, token in enumerate(row):
        classes = ["nbkit-token"] + ["of-subject"] * (place in of_subject) + ["last"] * (place == last)
        title = "the subject's last token: the edit acts here" if place == last else f"token {place}"
        text = escape(token.replace("\n", "⏎").replace(" ", "␣")) or "∅"
        boxes.append(f'<span class="{" ".join(classes)}" title="{title}">{text}</span>')
    return "".join(boxes)


def differing(before: str, after: str) -> tuple[str, str]:
    """Two texts with the words in which they differ marked: struck out in the first, underlined in the second."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (before, after))
    left, right = [], []
    for how, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        was, is_now = escape("".join(old[i:j])), escape("".join(new[k:m]))
        left.append(was if how == "equal" or not was else f"<del>{was}</del>")
        right.append(is_now if how == "equal" or not is_now else f"<ins>{is_now}</ins>")
    return "".join(left), "".join(right)


def error(raised: BaseException) -> str:
    """An error in words. Of one that is not nbkit's own the traceback can be unfolded."""
    text = f"<b>{escape(_title(raised))}</b> {escape(str(raised) or type(raised).__name__)}"
    if not isinstance(raised, NbkitError):
        lines = "".join(traceback.format_exception(raised))
        text += f"<details><summary>where it arose</summary><pre>{escape(lines)}</pre></details>"
    return f'<div class="nbkit-error" role="alert">{text}</div>'


def _title(raised: BaseException) -> str:
    return "Not possible:" if isinstance(raised, NbkitError) else f"Unexpected {type(raised).__name__}:"


def note(text: str) -> str:
    """A sentence that is read out when it appears."""
    return f'<div class="nbkit-note" role="status">{escape(text)}</div>' if text else ""


def figure(drawn: Figure, alt: str) -> str:
    """A figure as an image with its content in words; without pyplot, so that no other figure is touched."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def html(content: str = "") -> HTML:
    """A widget of such pieces."""
    widget = HTML(content)
    widget.add_class("nbkit-panel")
    return widget
