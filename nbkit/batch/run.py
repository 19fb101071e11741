"""Run notebooks without a browser: papermill, but strict.

    run_notebook("notebooks/01_single_edit_collapse.ipynb", {"n_requests": 50})

Everything that can be refused is refused before a kernel starts (nbkit/parameters.py says what); a failure names the
cell. The executed copy of a run goes to runs/NOTEBOOK/NOTEBOOK--name=value.ipynb (copies.py), its figures to the folder
of that name beside it.
"""

import glob
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from nbkit import paths
from nbkit.batch.copies import copy_folder, copy_name, own_partial, writable
from nbkit.batch.kernels import START_SECONDS, Kernel
from nbkit.batch.parameters import declared, fitted, papermill_path
from nbkit.batch.record import keep_record, record_of, run_named
from nbkit.errors import NotebookError, ParameterError, ResultsError
from nbkit.records.bounds import shown

NOTEBOOKS = paths.ROOT / "notebooks"


def find_notebook(name) -> Path:
    """The notebook at a path, or the one in notebooks/ whose name begins so: "01" will do, though there is an "01b".

    Raises ParameterError when there is none, or more than one.
    """
    try:
        alike = sorted(NOTEBOOKS.glob(f"{glob.escape(str(name))}*.ipynb")) if Path(name).name == str(name) else []
        alike = [path for path in alike if path.stem.startswith(f"{name}_")] or alike
        for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb", *(alike if len(alike) == 1 else [])):
            if path.is_file():
                return path
    except (OSError, TypeError) as error:  # too long for a file, or no text and no path
        raise ParameterError(f"{shown(name)} can be no notebook: {error}") from None
    present = ", ".join(path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb")))
    raise ParameterError(f"there is no notebook {name}; notebooks/ holds: {present or 'none'}")


def run_notebook(
    path, parameters: Mapping[str, object] | None = None, out_dir=None, progress=True, figures=None
) -> Path:
    """Execute a notebook with some of its parameters replaced, in its own folder, and return the executed copy.

    parameters: name -> value; a string is read as the type that the notebook declares.
    out_dir: receives the folder NOTEBOOK/ with the copy; paths.RUNS when None.
    figures: the folder for its figures; that of the copy's name, beside it, when None.
    Raises ParameterError and ResultsError before anything runs, NotebookError when a cell fails.
    """
    path = find_notebook(path).resolve()
    known = declared(path)
    values = fitted(path, known, {} if parameters is None else parameters)
    copy = writable(copy_folder(path, out_dir)) / copy_name(path.stem, values)
    return execute(path, known, values, copy, progress, figures=figures)


def execute(path, known, values, copy, progress=True, kernel=None, figures=None) -> Path:
    """Execute a notebook with checked values, to `copy`; what was executed is recorded in it (record.py).

    known: the parameters that the notebook declares.
    kernel: a `kept.KeptKernel` to run in; a new one that ends with the run when None. figures: as in `run_notebook`.
    """
    failed = copy.with_suffix(".failed.ipynb")
    bar = {"desc": path.stem, "leave": False, "disable": None, "position": 1} if progress else False
    record = record_of(path, known, values)
    try:
        with own_partial(copy) as partial:
            failure = _executed(path, copy, partial, known, values, bar, kernel, figures)
            if failure is not None and not partial.exists():
                raise NotebookError(failure)
            if failure is not None:
                os.replace(partial, failed)
                raise NotebookError(f"{failure}\n  the copy up to there: {failed}")
            keep_record(partial, record)
            os.replace(partial, copy)
        for earlier in (failed, copy.with_suffix(".partial.ipynb")):  # of runs with the same parameters
            earlier.unlink(missing_ok=True)
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(f"{copy} could not be written: {error}") from error
    return copy


def _executed(path, copy, partial, known, values, bar, kernel, figures) -> str | None:
    """Executes the notebook to `partial`; what failed, None if nothing did."""
    try:
        with (
            run_named(copy.stem, path, known, values, figures or copy.with_suffix("")),
            Kernel(path.parent) if kernel is None else nullcontext(kernel) as running,
        ):
            papermill.execute_notebook(
                papermill_path(path),
                papermill_path(partial),
                parameters=values,
                kernel_name="python3",
                language="python",
                km=running.ready(),
                start_timeout=START_SECONDS,
                progress_bar=bar,
                cwd=path.parent,
            )
    except PapermillExecutionError as error:
        return describe(path, partial, f"{error.ename}: {error.evalue}" if error.evalue else error.ename)
    except DeadKernelError:
        return describe(path, partial, "the kernel died (out of memory, or killed)")
    except RuntimeError as error:  # what jupyter_client raises for a kernel that does not come up
        return describe(path, partial, f"the kernel did not start: {error}")
    return None


def describe(path, executed, what) -> str:
    """One failure as text: which cell of the notebook, how it begins, and what happened there.

    Cells are counted from 1 over all cells, text included, as in the notebook itself. The failing cell is the last
    one that started; papermill adds a cell with the parameters, and marks a failure by two cells of its own.
    """
    added = ("injected-parameters", "papermill-error-cell-tag")
    cells = nbformat.read(executed, as_version=4).cells if executed.exists() else []
    own = [c for c in cells if not set(added) & set(c.metadata.get("tags", []))]
    started = [(n, c) for n, c in enumerate(own, 1) if c.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return f"{path.name}: {what}"
    number, cell = started[-1]
    begins = next((line for line in cell.source.splitlines() if line.strip()), "")
    return f"{path.name}, cell {number} failed: {what}\n  the cell begins: {begins}"
