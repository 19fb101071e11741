"""Files of tensors with what is known about them: safetensors, whose metadata hold one JSON text a name.

    write_tensors(path, {"second_moment": C}, {"n_tokens": 100_000})
    with reading_tensors(path, "second moment", "delete it to have it computed anew") as (tensors, about):
        C, n_tokens = tensors["second_moment"], about["n_tokens"]

Nothing in such a file is ever executed. Numbers keep every bit, NaN and infinity included, and a bit that has changed
since is noticed: the metadata hold a checksum of everything else. A file from before there was one is read without.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nbkit.errors import ResultsError
from nbkit.records.files import replacing

# Two names in the metadata, so that no damage of one of them makes a file look as if it never had a checksum.
CHECKED, CHECKSUM = "nbkit.checked", "nbkit.sha256"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all. about: what JSON can hold, by name.

    Contiguous tensors on the CPU are written from where they are, others are copied there first. ResultsError if the
    file cannot be written; one of that name then stays as it was.
    """
    own: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if own[name].untyped_storage().data_ptr() in places:  # the format refuses tensors that share memory
            own[name] = own[name].clone()
        places.add(own[name].untyped_storage().data_ptr())
    metadata = {name: json.dumps(value) for name, value in about.items()}
    metadata |= {CHECKED: "yes", CHECKSUM: _checksum(own, metadata)}
    try:
        with replacing(path) as temporary:
            save_file(own, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise ResultsError(f"{path} cannot be written: {error}") from error


@contextmanager
def reading_tensors(path: Path, what: str, advice: str = "") -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The tensors of a file, on the CPU and mapped to it where they can be, and what it says about them.

    ResultsError if there is none or it is damaged. What the `with` does to make sense of the content is held to be
    right, so an error of it means damage too. The message names the file, says that it is no `what`, and ends in
    `advice`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        marks = [metadata.pop(name, None) for name in (CHECKED, CHECKSUM)]
        if marks != [None, None] and marks != ["yes", _checksum(tensors, metadata)]:
            raise ValueError("its content is not that of its checksum")
        about = {name: json.loads(text) for name, text in metadata.items()}
        yield tensors, about
    except ResultsError:
        raise
    except FileNotFoundError as error:
        raise ResultsError(f"there is no file {path}") from error
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        advice = advice and f"; {advice}"
        raise ResultsError(f"{path} is damaged, or no {what} ({reason}){advice}") from error


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of names, types, shapes and every bit. The tensors are contiguous and on the CPU."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
