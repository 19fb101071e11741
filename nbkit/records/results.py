"""Result rows in Parquet files, stored so that nothing is computed twice and nothing computed is lost.

    study = Store().study("single_edits", key={"model": lm.hash, "method": "rome", ...})
    frame = study.complete(units, compute)      # compute(unit) -> rows; units that are stored are not computed again

A *study* is a folder named by the digest of its key, that is, of everything that determines its rows. A *unit* is what
is computed in one piece (one edit, one step of a sequence); its rows are stored together or not at all. Finished units
are stored every few seconds, also while the next one is being computed; those that were computed side by side at once,
all or none. A process that is killed loses the finished units of `FLUSH_SECONDS` and what it was computing; one that is
interrupted, or ended by SIGTERM or SIGHUP, loses what it was computing. Several can add to one study. Needs no torch.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from nbkit import paths
from nbkit.errors import ResultsError
from nbkit.records.bars import Within, bar
from nbkit.records.files import write_atomically
from nbkit.records.keeper import kept_up
from nbkit.records.parts import PARTS, read_part, write_part
from nbkit.records.provenance import canonical, digest, now, plain, provenance
from nbkit.records.runs import note_units

__all__ = ["Store", "Study", "provenance", "read_table"]

FLUSH_SECONDS = 5.0  # what a killed process can lose of finished units that were computed one by one

# Units that a failed write left in memory, by study folder: opening the study again in this process takes them over.
_kept: dict[Path, dict[str, list[dict]]] = {}


def read_table(path: str | Path, made_by: str) -> pd.DataFrame:
    """The rows of one Parquet file that a command has written; ResultsError, naming the command, where it is not."""
    try:
        return pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "is not there" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise ResultsError(f"{path} {what}: `{made_by}` makes it") from error


class Store:
    """A folder of studies; `runs/results` unless told otherwise."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = paths.RUNS / "results" if folder is None else Path(folder)

    def study(self, name: str, key: dict, provenance: dict | None = None) -> "Study":
        """Opens the study `name` of this key with the rows that it has stored; writes nothing yet.

        Args:
            name: the kind of study, a folder name.
            key: everything that determines the rows (parameters, seeds, hashes of model, data and code), and nothing
                else: no time, no commit.
            provenance: columns added to each new row, from `nbkit.results.provenance`.

        Raises ResultsError for a damaged file, which it names.
        """
        return Study(self.folder / name / digest(key), key, {"study": name, **(provenance or {})})


class Study:
    """The rows of one study, on disk and in memory; made by `Store.study`."""

    def __init__(self, folder: Path, key: dict, provenance: dict):
        self.folder, self.key, self.provenance = folder, plain(key), provenance
        self._schema = pa.schema([])
        self._stored: dict[str, list[dict]] = {}
        self._unsaved: dict[str, list[dict]] = {}
        self._lock = threading.RLock()  # of what is unsaved; a signal's handler may flush while this thread does
        self._last_flush = time.monotonic()
        self._check_key()
        for part in sorted(folder.glob(PARTS)):
            self._read(part)
        for unit, rows in _kept.get(folder, {}).items():
            self._admit(unit, rows)

    @classmethod
    def stored(cls, folder: Path) -> "Study":
        """The study in a folder that `Store.study` has made, to read: its key is the one that is stored there."""
        return cls(folder, _key_in(folder), {})

    @property
    def units(self) -> list[str]:
        """The units whose rows are there, in the order of computing."""
        return list(self._stored | self._unsaved)

    def _check_key(self) -> None:
        path = self.folder / "key.json"
        if path.is_file() and canonical(_key_in(self.folder)) != canonical(self.key):
            raise ResultsError(f"{path} holds another key than its folder's name says: delete the folder")

    def _read(self, part: Path) -> None:
        try:
            by_unit, schema = read_part(part)
        except FileNotFoundError:  # deleted since it was listed: its rows are computed again
            return
        for unit, unit_rows in by_unit.items():
            self._stored.setdefault(unit, unit_rows)  # two processes may both have computed it: the first one counts
        self._schema = self._joined(schema, str(part))

    def _joined(self, schema: pa.Schema, where: str) -> pa.Schema:
        """The study's columns with those of `schema`, whole numbers widened to decimal ones where both occur."""
        try:
            return pa.unify_schemas([self._schema, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ResultsError(f"{where}: a column has another type than in the study's other rows: {error}") from error

    def _admit(self, unit: str, rows: list[dict]) -> None:
        columns = dict.fromkeys(name for row in rows for name in row)
        try:
            schema = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]).schema
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ResultsError(f"unit {unit}: values that no table column can hold: {error}") from error
        self._schema = self._joined(schema, f"unit {unit}")
        self._unsaved[unit] = rows  # one assignment: an interrupt leaves the unit in whole or out

    def done(self, unit: str) -> bool:
        """Whether the unit's rows are there, stored or waiting in memory."""
        return unit in self._stored or unit in self._unsaved

    def add(self, unit: str, rows: Iterable[dict[str, Any]]) -> None:
        """Adds a finished unit with its rows (at least one), and writes to disk if the last time was a while ago.

        Values are text, numbers (numpy's and one-element tensors too), truth values, None, or lists of those; NaN and
        infinity stay what they are. Raises ResultsError for other values and for what `flush` raises.
        """
        self._take(unit, rows)
        if time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def add_together(self, units: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> None:
        """Adds units that were computed side by side, and writes them to disk: all in one file, as `add` and `flush`.

        What is resumed is then computed beside the same units again, and rows come out the same to the last bit.
        """
        with self._lock:
            for unit, rows in units:
                self._take(unit, rows)
            self.flush()

    def _take(self, unit: str, rows: Iterable[dict[str, Any]]) -> None:
        more = {**self.provenance, "created": now()}
        rows = [{name: _item(value) for name, value in row.items()} for row in rows]
        if not rows:
            raise ResultsError(f"unit {unit} has no rows, so it could not be told from one that was never computed")
        with self._lock:
            self._admit(unit, [{**row, **{name: more[name] for name in more if name not in row}} for row in rows])

    def flush(self) -> None:
        """Writes what is only in memory to a new part file.

        Raises ResultsError if the folder is full or cannot be written. Then the rows stay in memory: the error's
        `study.frame()` gives them, and opening the same study again in this process keeps and writes them.
        """
        with self._lock:
            self._last_flush = time.monotonic()
            if self._unsaved:
                self._write()

    def _write(self) -> None:
        try:
            if not (self.folder / "key.json").is_file():  # deleted since, and rows without their key could not be read
                self._write_key()
            write_part(self.folder, self._unsaved, self._schema)
        except OSError as error:
            _kept[self.folder] = dict(self._unsaved)
            raise self._failure(error, f"{len(self._unsaved)} finished units are kept in memory") from error
        self._stored |= self._unsaved
        self._unsaved = {}
        _kept.pop(self.folder, None)

    def _failure(self, error: OSError, state: str) -> ResultsError:
        reason = os.strerror(error.errno) if error.errno else str(error)
        failure = ResultsError(
            f"cannot write results to {self.folder}: {reason}; {state}. Free or unlock the folder, or set NBKIT_RUNS "
            "to another one, and run this again"
        )
        failure.study = self
        return failure

    def frame(self, units: Iterable[str] | None = None) -> pd.DataFrame:
        """The rows as a table: of `units` in their order, or of every unit in the order of computing."""
        present = self._stored | self._unsaved
        units = list(present) if units is None else list(units)
        missing = [unit for unit in units if unit not in present]
        if missing:
            raise ResultsError(f"{len(missing)} of {len(units)} units of {self.folder} are not computed yet")
        rows = [row for unit in units for row in present[unit]]
        return pa.Table.from_pylist(rows, schema=self._schema).to_pandas()

    def complete(
        self,
        units: Iterable[str],
        compute: Callable[[str], Iterable[dict]],
        label: str = "results",
        steps: int = 1,
        each: str = "unit",
    ) -> pd.DataFrame:
        """Computes the units that are not done yet, in order, with one progress bar; returns the rows of all.

        Args:
            units: their order is that of the rows returned.
            compute: gives a unit's rows, as a list or one by one (a generator, which is closed after an exception).
            label: what the progress bar says. steps: how many rows of a unit it counts. each: what one of these is.
        """
        units = list(units)
        with self._computing(units, label, steps, each) as (pending, shown):
            for unit in pending:
                end, rows, produced = shown.n + steps, [], compute(unit)
                with contextlib.closing(produced) if hasattr(produced, "close") else contextlib.nullcontext():
                    for row in produced:
                        rows.append(row)
                        shown.update(min(1, end - shown.n))
                self.add(unit, rows)
                shown.update(end - shown.n)
        return self._asked(units)

    def complete_together(
        self,
        units: Iterable[str],
        compute: Callable[[list[str]], Iterable[Sequence[tuple[str, list[dict]]]]],
        size: int,
        label: str = "results",
        each: str = "unit",
    ) -> pd.DataFrame:
        """As `complete`, for units that are computed faster side by side: `compute` gets up to `size` of them at once.

        It gives units with their rows, those that were computed together in one list, which is stored at once. Which
        units are computed together depends on their places and not on what was done before: see `add_together`.
        """
        units = list(units)
        with self._computing(units, label, 1, each) as (pending, shown):
            waiting, different = set(pending), list(dict.fromkeys(units))
            for start in range(0, len(different), size):
                asked = [unit for unit in different[start : start + size] if unit in waiting]
                produced = compute(asked) if asked else ()
                with contextlib.closing(produced) if hasattr(produced, "close") else contextlib.nullcontext():
                    for done in produced:
                        self.add_together(done)
                        shown.update(len(done))
        return self._asked(units)

    def _asked(self, units: list[str]) -> pd.DataFrame:
        """The rows of units that are all done, which the present run, if it is one of a notebook, is noted for."""
        try:
            note_units(self.folder, units)
        except OSError as error:
            raise self._failure(error, "the rows are stored") from error
        return self.frame(units)

    @contextlib.contextmanager
    def _computing(
        self, units: list[str], label: str, steps: int, unit: str
    ) -> Iterator[tuple[list[str], tqdm | Within]]:
        """The units not done yet, and a bar over all; what is added within this `with` is on disk behind it."""
        pending = [unit for unit in dict.fromkeys(units) if not self.done(unit)]
        if not pending and not self._unsaved:
            yield pending, bar(0, label, unit, progress=False)
            return
        n_done = len(set(units)) - len(pending)
        shown = bar((n_done + len(pending)) * steps, label, unit, done=n_done * steps, delay=0)
        with self, shown, kept_up(self.flush, FLUSH_SECONDS):
            yield pending, shown

    def __enter__(self) -> Self:
        """Makes the folder and proves that it can be written, before hours of computing; raises ResultsError if not."""
        try:
            self._write_key()
        except OSError as error:
            raise self._failure(error, "nothing was computed") from error
        return self

    def _write_key(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "key.json", lambda file: file.write(_as_text(self.key).encode()))

    def __exit__(self, kind, error, traceback) -> None:
        if not (isinstance(error, ResultsError) and getattr(error, "study", None) is self):  # it has just failed
            self.flush()


def _key_in(folder: Path) -> dict:
    path = folder / "key.json"
    try:
        text = path.read_text(encoding="utf-8")
        key = json.loads(text)
        if text != _as_text(key) or digest(key) != folder.name:
            raise ValueError("its content is not what its folder is named by")
    except (OSError, ValueError, TypeError) as error:
        raise ResultsError(f"{path} is damaged ({error}): delete its folder to compute the study anew") from error
    return key


def _as_text(key: dict) -> str:
    return json.dumps(key, indent=1, sort_keys=True, ensure_ascii=False)


def _item(value: Any) -> Any:
    """A Python value for a numpy scalar, an array or a small tensor."""
    return value.tolist() if hasattr(value, "tolist") else value
