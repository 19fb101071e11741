"""Write a file whole or not at all; tell whether a folder can be written, and a file has changed."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes `path` through `write(file)`; errors as those of `replacing`."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        write(file)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty hidden file beside `path`, to be filled or replaced in the `with`, which then takes its name.

    So no other process, nor this one after a power cut, sees half of it. Raises OSError, leaving `path` as it was, if
    the folder is full or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # a library that puts a file of its own there may have made it private
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def prove_writable(folder: Path) -> None:
    """OSError unless a file can be written in a folder that is there; none is left behind."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"probe")


def states(place: str | Path) -> list[tuple[str, int, int]]:
    """Name below `place`, size in bytes and time of change in ns of a file, or of every file of a folder, by name.

    `~` is the home of the user. What is not there has no states, and a file that is deleted meanwhile none.
    """
    place = Path(place).expanduser()
    found = []
    for path in [place] if place.is_file() else sorted(place.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            state = path.stat()
            if path.is_file():
                found.append((path.relative_to(place).as_posix(), state.st_size, state.st_mtime_ns))
    return found
