"""Edits as files: one safetensors file holds any number of them, with all that they know about themselves.

    save_edits(edits, "edits.safetensors", lm)
    edits = load_edits("edits.safetensors", lm)         # of the same model, or it is refused

Tensors (updates, and those in `info`) are stored as they are, in their own types. Everything else is one JSON text in
the file's metadata, under "nbkit":

    {"format": 1, "nbkit": version, "model": name, "base": hash of the unedited model,
     "edits": [{"method", "requests", "hparams", "info", "deltas"}, ...]}

in which a tensor is {"tensor": its name in the file}, an array {"array": name}, a tuple {"tuple": [...]}, and a dict
{"dict": [[key, value], ...]}. Numbers keep every bit, NaN and infinity included. Nothing in it is ever executed.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nbkit
from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.edits.updates import Dense, LowRank, Update
from nbkit.errors import ModelError, ResultsError
from nbkit.records.requests import EditRequest

FORMAT = 1
KINDS = {"low_rank": LowRank, "dense": Dense}  # the fields of each are tensors


def save_edits(edits: Edit | Sequence[Edit], path: str | Path, lm: EditableModel) -> None:
    """Writes edits of `lm` to one file, whole or not at all; a file of that name is replaced.

    The file names the unedited model by its hash, whatever edits are in lm's weights now. ModelError for an edit that
    does not fit lm; ResultsError if the file cannot be written, or if `info` or `hparams` hold something that is no
    text, number, tensor, array, None, or list, tuple or dict of those.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    tensors: dict[str, Tensor] = {}
    records = []
    for index, edit in enumerate(edits):
        for name, delta in edit.deltas.items():
            lm.weight_of(name, delta)
        records.append(_record(edit, f"{index}", tensors))
    about = {
        "format": FORMAT,
        "nbkit": nbkit.__version__,
        "model": lm.name,
        "base": lm.base_hash,
        "edits": records,
    }
    write_tensors(Path(path), tensors, {"nbkit": about})


def load_edits(path: str | Path, lm: EditableModel | None) -> list[Edit]:
    """The edits of a file, each equal in every bit to the one saved; updates on lm's device, the rest on the CPU.

    ModelError if they are of another model than lm (unedited, in the same dtype: lm's own edits do not matter). None
    for lm reads them without that check, to look at them. ResultsError for a file that is missing, damaged or not of
    edits, or with an update whose tensors do not multiply.
    """
    path = Path(path)
    with reading_tensors(path, "file of edits") as (tensors, content):
        about = content["nbkit"]
        if about["format"] != FORMAT:
            raise ResultsError(f"{path} was written by nbkit {about['nbkit']} in a format unknown here")
        base, model = str(about["base"]), about["model"]
        edits = [_edit(record, tensors) for record in about["edits"]]
    if lm is not None and base != lm.base_hash:
        raise ModelError(
            f"{path} holds edits of {model} ({base[:12]}), not of {lm.name} ({lm.base_hash[:12]}): "
            "their weights, configurations or dtypes differ"
        )
    if lm is None:
        return edits
    for edit in edits:
        for name, delta in edit.deltas.items():
            lm.weight_of(name, delta)
    return [dataclasses.replace(e, deltas={n: d.to(lm.device) for n, d in e.deltas.items()}) for e in edits]


def _record(edit: Edit, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An edit as JSON can hold it; its tensors are put into `tensors`."""
    deltas = {}
    for name, delta in edit.deltas.items():
        (kind,) = (kind for kind, known in KINDS.items() if type(delta) is known)
        parts = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}
        deltas[name] = [kind, {part: _put(tensor, f"{place}.{name}.{part}", tensors) for part, tensor in parts.items()}]
    return {
        "method": edit.method,
        "requests": [dataclasses.asdict(request) for request in edit.requests],
        "hparams": _encoded(dict(edit.hparams), f"{place}.hparams", tensors),
        "info": _encoded(dict(edit.info), f"{place}.info", tensors),
        "deltas": deltas,
    }


def _edit(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    return Edit(
        deltas={
            name: _multiplying(KINDS[kind](**{part: tensors[at] for part, at in parts.items()}), name)
            for name, (kind, parts) in record["deltas"].items()
        },
        requests=tuple(EditRequest(**request) for request in record["requests"]),
        method=record["method"],
        hparams=_decoded(record["hparams"], tensors),
        info=_decoded(record["info"], tensors),
    )


def _multiplying(delta: Update, name: str) -> Update:
    parts = {field.name: getattr(delta, field.name) for field in dataclasses.fields(delta)}
    shapes = [tuple(part.shape) for part in parts.values()]
    fit = all(len(shape) == 2 for shape in shapes)
    fit = fit and all(left[1] == right[0] for left, right in itertools.pairwise(shapes))
    types = {part.dtype for part in parts.values()}
    if not fit or len(types) > 1 or not next(iter(types)).is_floating_point:
        what = ", ".join(f"{part} {tuple(tensor.shape)} {tensor.dtype}" for part, tensor in parts.items())
        raise ValueError(f"its update of {name} is no matrix, and no product of matrices of one float type: {what}")
    return delta


def _put(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> str:
    while name in tensors:  # {"a.b": ...} beside {"a": {"b": ...}}
        name += "'"
    tensors[name] = tensor
    return name


def _encoded(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        return {"tensor": _put(value, place, tensors)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": _put(torch.from_numpy(value.copy()), place, tensors)}
    if isinstance(value, Mapping):
        return {"dict": [[key, _encoded(item, f"{place}.{key}", tensors)] for key, item in _plain_keys(value, place)]}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise ResultsError(f"edit {place}: a {type(value).__name__} cannot be stored in a file of edits")


def _plain_keys(value: Mapping, place: str):
    for key in value:
        if not isinstance(key, (str, int)):
            raise ResultsError(f"edit {place}: the key {key!r} cannot be stored in a file of edits")
    return value.items()


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in content)
    return {key: _decoded(item, tensors) for key, item in content}
