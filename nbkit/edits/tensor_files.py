"""Files of tensors with what is known about them: safetensors, whose metadata hold one JSON text a name.

    write_tensors(path, {"second_moment": C}, {"checks": checks})
    about = read_about(path)
    tensors = read_tensors(path)

Nothing in such a file is ever executed. Numbers keep every bit, NaN and infinity included.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nbkit.errors import ResultsError
from nbkit.records.files import write_atomically


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all. about: what JSON can hold, by name.

    ResultsError if it cannot be written; a file of that name then stays as it was.
    """
    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if own[name].untyped_storage().data_ptr() in places:  # the format refuses tensors that share memory
            own[name] = own[name].clone()
        places.add(own[name].untyped_storage().data_ptr())
    metadata = {name: json.dumps(value) for name, value in about.items()}
    try:
        write_atomically(path, lambda file: save_file(own, file.name, metadata))
    except (OSError, SafetensorError) as error:
        raise ResultsError(f"{path} cannot be written: {error}") from error


def read_about(path: Path, what: str = "tensors", advice: str = "") -> dict[str, Any]:
    """What a file says about its tensors, which are not read.

    ResultsError if there is none or it is damaged; the message says that it is no file of `what`, and ends in `advice`.
    """
    return _read(path, what, advice, lambda file: {k: json.loads(text) for k, text in (file.metadata() or {}).items()})


def read_tensors(
    path: Path, names: Iterable[str] | None = None, what: str = "tensors", advice: str = ""
) -> dict[str, Tensor]:
    """The tensors of a file, all or those named, on the CPU, where they may be mapped to it. Errors as `read_about`."""
    return _read(path, what, advice, lambda file: {name: file.get_tensor(name) for name in names or file.keys()})


def _read(path: Path, what: str, advice: str, read: Callable[[safe_open], dict]) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return read(file)
    except FileNotFoundError as error:
        raise ResultsError(f"there is no file {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        advice = advice and f"; {advice}"
        raise ResultsError(f"{path} is damaged, or no file of {what} ({error}){advice}") from error
