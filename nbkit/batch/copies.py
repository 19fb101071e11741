"""All about executed copies: where they lie, what they are called, and how two processes keep out of each other's way.

A copy is called NOTEBOOK--name=value.ipynb. While the notebook runs it has a name that no other process has,
....XXXXXXXX.partial.ipynb; after a failure it is ....failed.ipynb, after an interrupt ....partial.ipynb. So a plain
name always means a complete run, and each of the three names holds one whole copy, of the last run that ended so.
"""

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbkit import paths
from nbkit.errors import ParameterError, ResultsError
from nbkit.records.files import prove_writable
from nbkit.records.provenance import digest

LONGEST_NAME = 120  # bytes of a file name before a hash stands for the rest
# A text that can be nothing else: no number, no None, True or False, no two parameters.
ALONE = re.compile(r"(?!-?\d+(\.\d+)?(e[+-]?\d+)?$|(None|True|False)$)(?!.*--)[\w.+-]+", re.ASCII)


def copy_folder(path, out_dir=None) -> Path:
    """Where the executed copies of a notebook go; ParameterError where a name is no text, which no copy could tell."""
    folder = Path(out_dir or paths.RUNS) / path.stem
    for place in map(str, (path, folder)):
        try:
            place.encode()
        except UnicodeEncodeError:
            raise ParameterError(f"{place!r} is no Unicode text: rename it, or move what you run elsewhere") from None
    return folder


def copy_name(stem, values) -> str:
    """A file name that says notebook and parameters; a hash is added where it does not say them exactly.

    Different values have different names: of a path only its last part is shown, of a text what a file name can hold,
    and a text that reads as a number or as several parts is told from these by the hash.

    >>> copy_name("01_collapse", {"seed": 1, "methods": ["rome"]})
    '01_collapse--seed=1--methods=rome.ipynb'
    """
    texts = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    shown = "--".join([stem, *(f"{name}={','.join(map(_last_part, items))}" for name, items in texts.items())])
    plain = re.sub(r"[^\w.,=+-]", "_", shown)
    exact = plain == shown and not plain.endswith((".partial", ".failed"))
    exact = exact and all(_said(item) for items in texts.values() for item in items)
    if not exact or len(plain.encode()) > LONGEST_NAME:
        plain = f"{plain.encode()[:LONGEST_NAME].decode(errors='ignore')}--{digest(values)}"
    return f"{plain}.ipynb"


def _last_part(value) -> str:
    """A value as a file name can say it: of a path what it is called."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _said(item) -> bool:
    """Whether an item is told from any other by its text."""
    return bool(ALONE.fullmatch(item)) if isinstance(item, str) else not isinstance(item, list | dict)


def writable(folder) -> Path:
    """The folder, made if missing; ResultsError when no file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        prove_writable(folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"cannot write to {folder}: {reason}; name another folder with --out") from error
    return folder


@contextmanager
def own_partial(copy) -> Iterator[Path]:
    """A name beside `copy` for a run that is on, which no other process has.

    Who finishes renames the file within this `with`. What is still called so at its end, since the run was interrupted
    or could not be told to have failed, becomes ....partial.ipynb, in place of an earlier one.
    """
    partial = copy.with_suffix(f".{uuid.uuid4().hex[:8]}.partial.ipynb")
    try:
        yield partial
    finally:
        if partial.exists():
            os.replace(partial, copy.with_suffix(".partial.ipynb"))
