"""All notebooks, several at once, each in a process of its own: what `make figures` and `make figures-full` do.

    failures = run_all(sorted(NOTEBOOKS.glob("*.ipynb")), figures=folder, full=True)

A notebook's defaults are small. The sizes that its question deserves stand in full/NAME.toml beside it, parameter by
parameter. One that measures time has its parameters cell tagged `alone`, and runs when nothing else does.
"""

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm.auto import tqdm

from nbkit.batch.copies import copy_folder, writable
from nbkit.batch.parameters import declared, fitted, parameters_cell
from nbkit.errors import NotebookError, ParameterError
from nbkit.records.bounds import check_number

THREADS = "OMP_NUM_THREADS"


def run_all(
    notebooks: Sequence[Path], out_dir=None, progress=True, figures=None, full=False, jobs: int | None = None
) -> dict[Path, NotebookError | ParameterError]:
    """Run notebooks with their defaults, `jobs` at a time; a failing one does not stop the others.

    full: with the sizes of `full_parameters` instead. figures: a folder for all their figures; None: as in
    `run_notebook`. jobs: None for `usual_jobs`; each has its share of the cores (OMP_NUM_THREADS, unless that is set).

    Returns what failed: notebook -> error. A folder that cannot be written raises ResultsError at once. An interrupt
    ends all of them, each of which stores what it has computed.
    """
    jobs = usual_jobs() if jobs is None else jobs
    check_number("jobs", jobs, whole=True, least=1, error=ParameterError)
    failures: dict[Path, NotebookError | ParameterError] = {}
    commands = {}
    for path in notebooks:
        writable(copy_folder(path, out_dir))
        try:
            values = full_parameters(path) if full else {}
            alone = "alone" in parameters_cell(path).metadata["tags"]
        except ParameterError as error:
            failures[path] = error
        else:
            commands[path] = _command(path, values, out_dir, figures), alone
    with tqdm(total=len(notebooks), desc="notebooks", unit="notebook", disable=None if progress else True) as bar:
        bar.update(len(failures))
        for together in (True, False):
            some = {path: command for path, (command, alone) in commands.items() if alone != together}
            _run(some, jobs if together else 1, failures, bar)
    return {path: failures[path] for path in notebooks if path in failures}


def full_parameters(path) -> dict[str, object]:
    """The parameters of the notebook at `path` in its full size: those of full/NAME.toml beside it, {} without one.

    ParameterError for a file that is no TOML, or values that do not fit the notebook.
    """
    file = Path(path).parent / "full" / f"{Path(path).stem}.toml"
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ParameterError(f"{file} cannot be read: {error}") from None
    try:
        return fitted(path, declared(path), values)
    except ParameterError as error:
        raise ParameterError(f"{file}: {error}") from None


def usual_jobs() -> int:
    """How many notebooks run at once, unless told: one a core, up to four; one, where they would share a GPU."""
    return 1 if Path("/proc/driver/nvidia/version").exists() else min(_cores(), 4)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command(path, values: Mapping[str, object], out_dir, figures) -> list[str]:
    command = [sys.executable, "-m", "nbkit", "run", str(Path(path).resolve())]
    for name, value in values.items():
        command += ["-p", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    for option, folder in (("--out", out_dir), ("--figures", figures)):
        command += [] if folder is None else [option, str(Path(folder).resolve())]
    return command


def _run(commands: Mapping[Path, list[str]], jobs: int, failures: dict, bar: tqdm) -> None:
    """Runs the commands, `jobs` at a time, and puts down what fails."""
    children = _Children({THREADS: str(max(1, _cores() // jobs)), **os.environ})
    with ThreadPoolExecutor(jobs) as pool:
        last_first = reversed(commands.items())  # the first one is the shortest: begun last, it leaves no core idle
        asked = {pool.submit(children.run, command): path for path, command in last_first}
        try:
            for future in as_completed(asked):
                path, (error, seconds) = asked[future], future.result()
                if error is not None:
                    failures[path] = NotebookError(error)
                bar.write(f"{path.stem}: {'done' if error is None else 'FAILED'} in {seconds:.0f} s", file=sys.stderr)
                bar.update()
        except BaseException:
            children.stop()
            raise


class _Children:
    """Processes that run commands, and can be ended together."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment
        self.running: set[subprocess.Popen] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, command: list[str]) -> tuple[str | None, float]:
        """What the command said if it failed, None if not, and its seconds."""
        start, pipe = time.monotonic(), subprocess.PIPE
        with self.lock:
            if self.stopped:
                return "not begun", 0.0
            child = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
            )
            self.running.add(child)
        said = child.communicate()[1].strip().removeprefix("error: ")
        self.running.discard(child)
        return (said or f"ended by {child.returncode}") if child.returncode else None, time.monotonic() - start

    def stop(self) -> None:
        """Has all of them store what they have computed and end, as Ctrl-C does; none begins any more."""
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.terminate()
