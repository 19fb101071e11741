"""Which stored rows a run of a notebook belongs to: a small file beside the rows, written while the run is on.

    runs/results/STUDY/KEY/runs/DIGEST.json: {"run", "notebook", "parameters", "started", "units", "checksum"}

A run is known by the environment variable NBKIT_RUN, which the batch runner sets; in JupyterLab there is none. Several
runs may ask for the same units, of which each is computed once.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbkit.errors import ResultsError
from nbkit.records.files import write_atomically
from nbkit.records.provenance import digest

SETTING = "NBKIT_RUN"
NOTED = {"run", "notebook", "parameters", "started", "units"}


def note_units(folder: Path, units: Iterable[str]) -> None:
    """Adds units to those that the present run has asked of the study in `folder`; OSError if it cannot be written."""
    run = json.loads(os.environ.get(SETTING, "null"))
    if run is None:
        return
    path = folder / "runs" / f"{digest([run['run'], run['parameters']])}.json"
    noted = _read(path)
    earlier = noted["units"] if noted is not None and noted["started"] == run["started"] else []
    path.parent.mkdir(parents=True, exist_ok=True)
    held = {**run, "units": list(dict.fromkeys([*earlier, *units]))}
    held = json.dumps({**held, "checksum": digest(held)}, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(held.encode()))


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """The runs noted in a study's folder; ResultsError for a damaged note."""
    noted = [_read(path) for path in sorted((folder / "runs").glob("*.json"))]
    return [run for run in noted if run is not None]


def _read(path: Path) -> dict[str, Any] | None:
    """The note in a file, without its checksum, which those of an earlier version do not have; None where none is."""
    try:
        text = path.read_text(encoding="utf-8")
        run = json.loads(text)
        written = json.dumps(run, indent=1, ensure_ascii=False)
        checksum = run.pop("checksum", None)
        if text != written or set(run) != NOTED or checksum not in (None, digest(run)):
            raise ValueError("its content is not that of its checksum")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ResultsError(f"{path} is damaged ({error}): delete it, its run writes it anew") from error
    return run
