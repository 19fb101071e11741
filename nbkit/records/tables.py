"""Stored rows as one table, for other tools: `nbkit.results("single_edits")`, `python -m nbkit results`.

    frame = results("single_edits")                                  # every stored row of that study
    frame = results("single_edits", run="01_single_edit_collapse")   # those that one run asked for
    overview()                                                       # which studies and runs there are
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from nbkit.errors import ResultsError
from nbkit.records.bounds import nearest
from nbkit.records.files import write_atomically
from nbkit.records.provenance import canonical
from nbkit.records.results import Store, Study
from nbkit.records.runs import runs_of

UNKNOWN: dict[str, Any] = {"run": None, "notebook": None, "parameters": {}, "units": None}
ENDINGS = (".csv", ".parquet")


def results(study: str, run: str | None = None, store: Store | None = None) -> pd.DataFrame:
    """All stored rows of a study, whatever their parameters, with the run that they belong to.

    Args:
        study: its name, as `overview` lists them: "single_edits", "sequential_edits" ...
        run: only rows that this run asked for: its executed copy's name without the ending.
        store: where rows are stored; `runs/results` unless told otherwise.

    Columns: run, notebook, run_n (units that the run asked of the study: requests, edits ...), run_seed (its parameter
    `seed`), key (the folder of the rows: those of one key differ in their unit only), parameters.NAME (everything in
    that key's parameters, lists as JSON), then the study's own columns. A row that several runs asked for stands once
    for each: choose a run, or drop duplicates of the other columns, before taking a mean. Run and notebook are empty
    for rows that no run of `python -m nbkit run` asked for, as in JupyterLab; run_n is then their number of units.

    Raises ResultsError for a study or run that is not there, and for a damaged file.
    """
    store = Store() if store is None else store
    tables = [
        _of_run(stored, one) for stored in _studies(store, study) for one in _runs(stored) if run in (None, one["run"])
    ]
    if not tables:
        known = sorted({one["run"] for stored in _studies(store, study) for one in _runs(stored) if one["run"]})
        raise ResultsError(f"{study} has no rows of a run {run!r}{nearest(run, known)}; its runs: {', '.join(known)}")
    frame = pd.concat([table.dropna(axis=1, how="all") for table in tables], ignore_index=True)
    names = list(dict.fromkeys(name for table in tables for name in table))  # a column that is all empty stays too
    return _one_type_a_column(frame.reindex(columns=names))


def overview(store: Store | None = None) -> pd.DataFrame:
    """The studies that are stored, by run: study, run, run_n (units asked for), model, stored (when, at last)."""
    store = Store() if store is None else store
    rows = []
    for folder in sorted(path for path in store.folder.glob("*") if path.is_dir()):
        for stored in _studies(store, folder.name):
            for one in _runs(stored):
                frame = _of_run(stored, one)
                about = {name: frame[name].iloc[-1] if name in frame else None for name in ("run_n", "model")}
                rows.append({"study": folder.name, "run": one["run"], **about, "stored": frame["created"].max()})
    return pd.DataFrame(rows, columns=["study", "run", "run_n", "model", "stored"])


def write_table(frame: pd.DataFrame, path: str | Path) -> Path:
    """Writes a table as its ending says, .csv or .parquet; ResultsError for another, and where it cannot be written."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ResultsError(f"{path} ends in neither of {', '.join(ENDINGS)}, which say how the table is written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            write_atomically(path, lambda file: frame.to_csv(file, index=False))
        else:
            write_atomically(path, lambda file: frame.to_parquet(file, index=False))
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _studies(store: Store, name: str) -> list[Study]:
    known = sorted(path.name for path in store.folder.glob("*") if path.is_dir())
    if name not in known:
        raise ResultsError(
            f"no rows of a study {name!r} are stored in {store.folder}{nearest(name, known)}; "
            f"there are {', '.join(known) or 'none'}"
        )
    keys = sorted(path.parent for path in (store.folder / name).glob("*/key.json"))
    opened = [Study.stored(folder) for folder in keys]
    return [study for study in opened if study.units]


def _runs(study: Study) -> list[dict]:
    """The runs of its units, and an unknown one for units that no run asked for.

    A run is left out while it has none yet, and when the files of its rows have been deleted.
    """
    runs = [run for run in runs_of(study.folder) if any(map(study.done, run["units"]))]
    asked = {unit for run in runs for unit in run["units"]}
    rest = [unit for unit in study.units if unit not in asked]
    return [*runs, *([{**UNKNOWN, "units": rest}] if rest else [])]


def _of_run(study: Study, run: dict) -> pd.DataFrame:
    units = [unit for unit in run["units"] if study.done(unit)]  # those of a run that goes on are not all there yet
    rows = study.frame(units).drop(columns="parameters", errors="ignore")
    about = {"run": run["run"], "notebook": run["notebook"], "run_n": len(units)}
    about |= {"run_seed": run["parameters"].get("seed"), "key": study.folder.name}
    for name, value in study.key.get("parameters", {}).items():
        about[f"parameters.{name}"] = canonical(value) if isinstance(value, dict | list) else value
    return pd.concat([pd.DataFrame([about] * len(rows), index=rows.index), rows], axis=1)


def _one_type_a_column(frame: pd.DataFrame) -> pd.DataFrame:
    """Text where a parameter is a number in some rows and a word in others: no file holds both in one column."""
    for name in frame.columns:
        try:
            pa.array(frame[name], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            frame[name] = frame[name].map(str, na_action="ignore")
    return frame
