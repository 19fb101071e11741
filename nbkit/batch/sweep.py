"""All combinations of some parameters' values, one run each: the grid of a notebook.

    sweep("01_single_edit_collapse", {"layer": [1, 2, 3], "key_mode": ["mixed", "prefixed"]})

Everything is checked before the first run. The runs share one kernel, so that libraries are imported and models loaded
once; a combination whose executed copy is there, made by the same notebook, parameters, code and files, is not run
again, so that a sweep that was broken off goes on. One that fails does not stop the others.
"""

import itertools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm.auto import tqdm

from nbkit.batch.copies import copy_folder, copy_name, writable
from nbkit.batch.kept import KeptKernel
from nbkit.batch.parameters import Parameter, check_names, declared, fitted
from nbkit.batch.record import is_finished, record_of
from nbkit.batch.run import execute, find_notebook
from nbkit.errors import NotebookError, ParameterError
from nbkit.records.bounds import shown

BETWEEN_COMMAS = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?=,|\Z)|(?!\s*")([^,]*)')


@dataclass(frozen=True)
class Combination:
    """One run of a sweep, and what became of it."""

    parameters: dict[str, object]
    copy: Path
    outcome: Literal["done", "was done before", "failed"]
    seconds: float
    error: NotebookError | None = None


def sweep(path, grid: Mapping[str, Sequence], out_dir=None, again=False, progress=True) -> list[Combination]:
    """Run a notebook with every combination of values, and return what became of each, in order.

    grid: parameter -> the values to take, each as in `run_notebook`.
    out_dir: receives the folder NOTEBOOK/ with the copies, named by their parameters; paths.RUNS when None.
    again: run finished combinations too.

    Raises ParameterError and ResultsError before anything runs. A parameter that names a model varies slowest, so that
    each is loaded once.
    """
    path = find_notebook(path).resolve()
    known = declared(path)
    if not isinstance(grid, Mapping):
        raise ParameterError(f"{path}: a grid is given as a dict, name -> list of values, not as {shown(grid)}")
    check_names(path, known, grid)
    runs = {}
    for values in combinations(known, grid):
        fit = fitted(path, known, values)
        runs[copy_name(path.stem, fit)] = fit  # values that are the same in other words are one run
    folder, outcomes = writable(copy_folder(path, out_dir)), []
    with (
        KeptKernel(path.parent) as kernel,
        tqdm(total=len(runs), desc="combinations", unit="run", disable=None if progress else True) as bar,
    ):
        for name, values in runs.items():
            one = _one(path, known, values, folder / name, again, progress, kernel)
            outcomes.append(one)
            if progress:
                bar.write(f"{one.copy.stem}: {one.outcome} ({one.seconds:.0f} s)", file=sys.stderr)
            bar.update()
    return outcomes


def _one(path, known, values, copy, again, progress, kernel) -> Combination:
    if not again and is_finished(copy, record_of(path, known, values)):
        return Combination(values, copy, "was done before", 0.0)
    start = time.monotonic()
    try:
        execute(path, known, values, copy, progress, kernel)
    except NotebookError as error:
        kernel.stop()  # who knows what the failure left there
        return Combination(values, copy, "failed", time.monotonic() - start, error)
    return Combination(values, copy, "done", time.monotonic() - start)


def combinations(known: Mapping[str, Parameter], grid: Mapping[str, Sequence]) -> list[dict[str, object]]:
    """Every combination of a grid's values, those of models varying slowest; ParameterError for a name without any."""
    for name, values in grid.items():
        if not isinstance(values, list | tuple | range) or not values:
            raise ParameterError(f"parameter {name}: give a list of one or more values to take, not {shown(values)}")
    models_first = sorted(grid, key=lambda name: not (known[name].place and known[name].place.group(1) == "model"))
    return [dict(zip(models_first, some, strict=True)) for some in itertools.product(*(grid[n] for n in models_first))]


def grid_of(path, pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The grid that a command line's (name, text) mean.

    A text holds the values of a number, a word or a truth value with commas between them (`"a, b",c` are two; a quote
    within quotes is written twice); of a list or a dict it is one value, as in `run`. A name that comes again adds its
    values.
    """
    known = declared(find_notebook(path))
    check_names(path, known, [name for name, _ in pairs])
    grid: dict[str, list[str]] = {}
    for name, text in pairs:
        whole = known[name].kind.removeprefix("Optional[").lower().startswith(("list", "dict"))
        grid.setdefault(name, []).extend([text] if whole else _between_commas(name, text))
    return grid


def _between_commas(name, text) -> list[str]:
    values, end = [], -1
    while text and end < len(text):
        found = BETWEEN_COMMAS.match(text, end + 1)
        if found is None:
            raise ParameterError(f"parameter {name}: in {shown(text)} a quote has no end, or no comma behind it")
        quoted, bare = found.groups()
        values.append(bare.strip() if quoted is None else quoted.replace('""', '"'))
        end = found.end()
    return values
