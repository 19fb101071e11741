"""Run notebooks without a browser: papermill, but strict.

    run_notebook("notebooks/01_single_edit_collapse.ipynb", {"n_requests": 50})

Everything that can be refused is refused before a kernel starts (nbkit/parameters.py says what); a failure names the
cell. The executed copy of a run goes to runs/NOTEBOOK/NOTEBOOK--name=value.ipynb, its figures to the folder of that
name beside it. While the notebook runs it is called ....partial.ipynb, and after a failure ....failed.ipynb, so that a
plain name always means a complete run.
"""

import glob
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm.auto import tqdm

from nbkit import paths
from nbkit.batch.parameters import declared, fitted, papermill_path
from nbkit.batch.record import keep_record, record_of, run_named
from nbkit.errors import NotebookError, ParameterError, ResultsError

NOTEBOOKS = paths.ROOT / "notebooks"
LONGEST_NAME = 120  # characters of a file name before a hash stands for the rest
START_SECONDS = 180  # for a kernel to start; a busy machine takes its time
STOP_SECONDS = 30.0  # for an interrupted kernel to write what it has computed


class OwnKernel(AsyncKernelManager):
    """Starts the Python that runs this process, whatever kernels named "python3" are registered for the user."""

    def __init__(self, **options):
        super().__init__(shutdown_wait_time=STOP_SECONDS, transport_encryption="auto", **options)

    @property
    def kernel_spec(self):
        return KernelSpec(**get_kernel_dict())


def find_notebook(name) -> Path:
    """The notebook at a path, or the one in notebooks/ whose name begins so: "01" will do.

    Raises ParameterError when there is none, or more than one.
    """
    alike = sorted(NOTEBOOKS.glob(f"{glob.escape(str(name))}*.ipynb")) if Path(name).name == str(name) else []
    for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb", *(alike if len(alike) == 1 else [])):
        if path.is_file():
            return path
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
    values = fitted(path, known, parameters or {})
    copy = writable(copy_folder(path, out_dir)) / copy_name(path.stem, values)
    return execute(path, known, values, copy, progress, figures=figures)


def copy_folder(path, out_dir=None) -> Path:
    """Where the executed copies of a notebook go."""
    return Path(out_dir or paths.RUNS) / path.stem


def execute(path, known, values, copy, progress=True, kernel=None, figures=None) -> Path:
    """Execute a notebook with checked values, to `copy`; what was executed is recorded in it (record.py).

    known: the parameters that the notebook declares.
    kernel: a `kept.KeptKernel` to run in; a new one that ends with the run when None. figures: as in `run_notebook`.
    """
    partial, failed = copy.with_suffix(".partial.ipynb"), copy.with_suffix(".failed.ipynb")
    bar = {"desc": path.stem, "leave": False, "disable": None, "position": 1} if progress else False
    record = record_of(path, known, values)
    failure = None
    try:
        with run_named(copy.stem, path, known, values, figures or copy.with_suffix("")):
            papermill.execute_notebook(
                papermill_path(path),
                papermill_path(partial),
                parameters=values,
                kernel_name="python3",
                language="python",
                **({"kernel_manager_class": OwnKernel} if kernel is None else {"km": kernel.ready()}),
                start_timeout=START_SECONDS,
                progress_bar=bar,
                cwd=path.parent,
            )
    except PapermillExecutionError as error:
        failure = describe(path, partial, f"{error.ename}: {error.evalue}" if error.evalue else error.ename)
    except DeadKernelError:
        failure = describe(path, partial, "the kernel died (out of memory, or killed)")
    except RuntimeError as error:  # what jupyter_client raises for a kernel that does not come up
        failure = describe(path, partial, f"the kernel did not start: {error}")
    except OSError as error:
        raise ResultsError(f"{partial} could not be written: {error}") from error
    if failure is not None:
        os.replace(partial, failed)
        raise NotebookError(f"{failure}\n  the copy up to there: {failed}")
    failed.unlink(missing_ok=True)  # of an earlier run with the same parameters
    keep_record(partial, record)
    os.replace(partial, copy)
    return copy


def run_all(
    notebooks: Sequence[Path], out_dir=None, progress=True, figures=None
) -> dict[Path, NotebookError | ParameterError]:
    """Run notebooks with their defaults, one after another; a failing one does not stop the others.

    Returns what failed: notebook -> error. A folder that cannot be written raises ResultsError at once.
    """
    failures = {}
    with tqdm(total=len(notebooks), desc="notebooks", unit="notebook", disable=None if progress else True) as bar:
        for path in notebooks:
            start = time.monotonic()
            try:
                run_notebook(path, out_dir=out_dir, progress=progress, figures=figures)
            except (NotebookError, ParameterError) as error:
                failures[path] = error
            outcome = "FAILED" if path in failures else "done"
            bar.write(f"{path.stem}: {outcome} in {time.monotonic() - start:.0f} s", file=sys.stderr)
            bar.update()
    return failures


def copy_name(stem, values) -> str:
    """A file name that says notebook and parameters; a hash is added where it cannot say them all.

    >>> copy_name("01_collapse", {"seed": 1, "methods": ["rome"]})
    '01_collapse--seed=1--methods=rome.ipynb'
    """
    texts = {name: v if isinstance(v, list) else [v] for name, v in values.items()}
    whole = "--".join([stem, *(f"{name}={','.join(map(str, v))}" for name, v in texts.items())])
    short = "--".join([stem, *(f"{name}={','.join(map(_last_part, v))}" for name, v in texts.items())])
    shown = re.sub(r"[^\w.,=+-]", "_", short)
    if shown != whole or len(shown) > LONGEST_NAME:
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
        shown = f"{shown[:LONGEST_NAME]}--{digest}"
    return f"{shown}.ipynb"


def _last_part(value) -> str:
    """A value as a file name can say it: of a path what it is called."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def writable(folder) -> Path:
    """The folder, made if missing; ResultsError when no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror}; name another folder with --out") from error
    return folder


def describe(path, executed, what) -> str:
    """One failure as text: which cell of the notebook, how it begins, and what happened there.

    Cells are counted from 1 over all cells, text included, as in the notebook itself. The failing cell is the last
    one that started; papermill adds a cell with the parameters, and marks a failure by two cells of its own.
    """
    added = ("injected-parameters", "papermill-error-cell-tag")
    cells = nbformat.read(executed, as_version=4).cells
    own = [c for c in cells if not set(added) & set(c.metadata.get("tags", []))]
    started = [(n, c) for n, c in enumerate(own, 1) if c.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return f"{path.name}: {what}"
    number, cell = started[-1]
    begins = next((line for line in cell.source.splitlines() if line.strip()), "")
    return f"{path.name}, cell {number} failed: {what}\n  the cell begins: {begins}"
