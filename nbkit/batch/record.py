"""What an executed copy is the outcome of: notebook, parameters, code and data, recorded in its metadata.

A copy whose record is that of a run to come is finished, and a sweep does not run it again. The run also has a name,
which the rows that it stores are noted by (records/runs.py).
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import nbformat

import nbkit
from nbkit import paths
from nbkit.records import embedded
from nbkit.records.files import states, write_atomically
from nbkit.records.provenance import code_version, digest, files_digest, now
from nbkit.records.runs import SETTING

FIELD = "nbkit"  # of the copy's metadata
PATHS = ("NBKIT_RUNS", "NBKIT_DATA", "NBKIT_HPARAMS", "NBKIT_STYLE")


def record_of(path, known, values) -> dict:
    """Everything that a run of the notebook depends on, as text and digests.

    known: the parameters that it declares; values: those given. Files and model folders count by their names, sizes and
    times, wherever a parameter or its default names one.
    """
    cells = [[cell.cell_type, cell.source] for cell in nbformat.read(path, as_version=4).cells]
    whole = {name: values.get(name, parameter.default) for name, parameter in known.items() if parameter.place}
    files = {name: [_state(item, path.parent) for item in _items(value)] for name, value in whole.items()}
    if own := os.environ.get("NBKIT_HPARAMS"):
        files["NBKIT_HPARAMS"] = [_state(own, Path.cwd())]
    record = {"notebook": digest(cells), "parameters": values, "code": _code(), "files": digest(files)}
    return json.loads(json.dumps(record))  # as it comes back from the copy


def keep_record(copy, record) -> None:
    """Writes the record into an executed copy."""
    executed = json.loads(Path(copy).read_text(encoding="utf-8"))
    executed["metadata"][FIELD] = record
    text = json.dumps(executed, indent=1, ensure_ascii=False) + "\n"
    write_atomically(Path(copy), lambda file: file.write(text.encode()))


def is_finished(copy, record) -> bool:
    """Whether there is a complete copy of exactly that run."""
    try:
        return json.loads(Path(copy).read_text(encoding="utf-8"))["metadata"][FIELD] == record
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or no copy: it is written anew
        return False


@contextmanager
def run_named(name, path, known, values, figures) -> Iterator[None]:
    """Within this `with`, a kernel that starts knows which run it is, and where its figures go.

    Folders and files that the environment names count from here, and not from where the kernel runs.
    """
    parameters = {each: values.get(each, parameter.default) for each, parameter in known.items()}
    run = {"run": name, "notebook": path.stem, "parameters": parameters, "started": now()}
    settings = {SETTING: json.dumps(run, default=str), "NBKIT_FIGURES": str(Path(figures).resolve())}
    for setting in PATHS:
        if value := os.environ.get(setting):
            place = Path(value).expanduser().resolve()
            settings[setting] = str(place) if place.exists() or setting != "NBKIT_STYLE" else value  # or a style's name
    before = {setting: os.environ.get(setting) for setting in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for setting, value in before.items():
            os.environ.pop(setting)
            if value is not None:
                os.environ[setting] = value


@functools.cache
def _code() -> str:
    """The code that rows are stored by, and that of the figures, which they are not."""
    return digest([code_version(), files_digest(Path(nbkit.__file__).parent / "plots")])


def _items(value) -> list:
    return value if isinstance(value, list) else [value]


def _state(value, folder) -> list:
    """What names, sizes and times of files are behind a value, if any."""
    if not isinstance(value, str) or not value:
        return []
    name = value.partition("@")[0]
    of_project: Mapping[str, str] = {**embedded.REQUESTS, **embedded.TEXTS}
    if name in of_project:
        return states(paths.DATA / of_project[name])
    if name in embedded.embedded_models():
        return states(paths.DATA / "models" / name)
    return states(Path(folder, Path(name).expanduser()))
