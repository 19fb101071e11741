"""The table of the requests: which columns, how they read, and that all rows can be searched and chosen by key."""

from collections.abc import Sequence

import pandas as pd
from itables import JavascriptFunction
from itables.widget import ITable

from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import request_columns
from nbkit.panels.fragments import shown
from nbkit.records.requests import EditRequest
from nbkit.studies.risk import MEASURED

# column of the frame -> its heading in the table, and its share of the width in per cent
COLUMNS = {
    "case_id": ("case", 8),
    "subject": ("subject", 16),
    "prompt": ("prompt", 17),
    "target_new": ("new target", 11),
    "target_true": ("true target", 11),
    "subject_kind": ("subject kind", 13),
    "risk": ("risk", 9),
    "signed_denominator": ("denominator", 15),
}
# DataTables moves about by arrow keys, and leaves to the page what Enter does. The widget evaluates a drawCallback, but
# no initComplete.
ENTER_CHOOSES = JavascriptFunction(
    """function () {
        this.api().off("key.nbkit").on("key.nbkit", (event, table, key, cell) => {
            if (key === 13) { table.row(cell.index().row).select(); }
        });
    }"""
)
LOOK = {
    "maxBytes": 0,  # all rows are in the browser: of a sample of them the rest would not be found
    "maxRows": 0,
    "select": "single",
    "keys": True,
    "drawCallback": ENTER_CHOOSES,
    "showIndex": False,
    "classes": "display compact nbkit-requests",
    "style": "table-layout:fixed;width:100%;margin:0",
    "columnDefs": [{"targets": at, "width": f"{width}%"} for at, (_, width) in enumerate(COLUMNS.values())],
    "autoWidth": False,
    "layout": {"topStart": "search", "topEnd": None, "bottomStart": "info", "bottomEnd": "paging"},
    "pageLength": 8,
    "text_in_header_can_be_selected": False,
}
STYLE = """<style>
.nbkit-requests td { overflow-wrap: anywhere; white-space: normal; }
.itables_anywidget:has(.nbkit-requests), .itables_anywidget .dt-container:has(.nbkit-requests) {
  background: transparent; }
</style>"""


class RequestTable(ITable):
    """A widget of the rows of `described`; `selected_rows` has the place of the one chosen."""

    def __init__(self, frame: pd.DataFrame):
        with pd.option_context("display.float_format", shown):
            super().__init__(_displayed(frame), **LOOK)

    def show(self, frame: pd.DataFrame) -> None:
        """Shows other values of the same rows; the one chosen stays so."""
        with pd.option_context("display.float_format", shown):
            self.update(_displayed(frame), **LOOK)


def described(lm: LanguageModel, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """What a table says of requests before their risk is known; one without a case_id goes by its place: "#3".

    Columns: case_id (as text), prompt, subject, subject_kind, target_new, target_true, and those of `collapse_risk`,
    which are empty.
    """
    rows = []
    for place, request in enumerate(requests):
        about = request_columns(lm, request)
        case = about.pop("case_id")
        targets = {"target_new": request.target_new, "target_true": request.target_true}
        rows.append({"case_id": f"#{place}" if case is None else case, "prompt": request.prompt, **about, **targets})
    return pd.DataFrame(rows).assign(layer=None, key_mode=None, **dict.fromkeys(MEASURED, float("nan")))


def _displayed(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table under their headings; cases as numbers where all are, which sorts them as such."""
    frame = frame[list(COLUMNS)].copy()
    if frame["case_id"].str.fullmatch(r"\d{1,15}").all():
        frame["case_id"] = frame["case_id"].astype(int)
    frame["target_true"] = frame["target_true"].fillna("")
    return frame.rename(columns={name: heading for name, (heading, _) in COLUMNS.items()})
