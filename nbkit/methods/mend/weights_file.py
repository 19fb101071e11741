"""The file of a trained hypernetwork: where it is, and whether it is of the model to be edited.

Its metadata say of which model and weights it is, and how it was made:

    format, model (name), hash (of the unedited model), dtype, shapes ({weight: [d_out, d_in]}), rank, n_hidden, recipe

The format changes with the hypernetwork's formula, for one that was trained with another cannot be edited with.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from nbkit import paths
from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError, ModelError, ResultsError
from nbkit.methods.mend.hypernetwork import Hypernetwork
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import embedded_models

FILE = "mend.safetensors"
LOG_BESIDE = "mend_training_log.jsonl"  # the log of its training: by step the losses, seconds so far and device
FORMAT = "nbkit mend 3"  # also of a training's checkpoints
UNCLAMPED = "nbkit mend 2"  # the last step of g was not bounded below by zero


def weights_path(model: str, given: str = "") -> Path:
    """The file that was given, or where a model's is if none was: beside an embedded model, else below runs/."""
    if given:
        return Path(given).expanduser()
    if model in embedded_models():
        return paths.DATA / "models" / model / FILE
    return paths.RUNS / "mend" / model.strip("/").replace("/", "--") / FILE


def save_hypernetwork(
    path: Path, hypernetwork: Hypernetwork, lm: LanguageModel, recipe: Mapping[str, object] | None = None
) -> None:
    """Writes the file, and the folders that it is in, whole or not at all. ResultsError if it cannot be written."""
    about = {
        "format": FORMAT,
        "model": lm.name,
        "hash": lm.base_hash,
        "dtype": str(lm.dtype),
        "shapes": hypernetwork.shapes,
        "rank": hypernetwork.rank,
        "n_hidden": hypernetwork.n_hidden,
        "recipe": dict(recipe or {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, hypernetwork.state_dict(), about)


def load_hypernetwork(lm: LanguageModel, weights: str = "") -> Hypernetwork:
    """The hypernetwork in the file `weights`, "" for the one at `weights_path`, on the model's device.

    MethodError, saying what to do, if there is none, or it is damaged or of another model: of other shapes, or of other
    weights, which can be told as long as the model has the number type that it was trained with.
    """
    path = weights_path(lm.name, weights)
    advice = f"train one with `python -m nbkit train-mend --model {lm.name}`"
    if not path.is_file():
        raise MethodError(f"mend has no trained hypernetwork for {lm.name} at {path}; {advice}")
    stat = path.stat()
    dtype = torch.promote_types(lm.dtype, torch.float32)
    try:
        hypernetwork, about = _stored(path, stat.st_mtime_ns, stat.st_size, lm.device, dtype)
    except ResultsError as error:
        raise MethodError(f"{error}; {advice}") from error
    other = f"{path} was trained for another model than {lm.name}"
    try:
        for name, shape in hypernetwork.shapes.items():
            lm.weight_of(name, Dense(torch.empty(shape, device="meta")))
    except ModelError as error:
        raise MethodError(f"{other}: {error}; {advice}") from error
    if about["dtype"] == str(lm.dtype) and about["hash"] != lm.base_hash:
        raise MethodError(f"{other}: {about['model']} had other weights when it was trained; {advice}")
    return hypernetwork


@lru_cache(maxsize=1)  # a sequence asks for the same file at every step
def _stored(
    path: Path, _mtime: int, _size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Hypernetwork, dict[str, Any]]:
    with reading_tensors(path, "hypernetwork") as (tensors, about):
        if about.get("format") == UNCLAMPED:
            raise ResultsError(
                f"{path} was trained when the hypernetwork's last step was not bounded below by zero, and with that "
                "formula alone it makes edits"
            )
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
        hypernetwork = Hypernetwork(about["shapes"], about["rank"], about["n_hidden"])
        hypernetwork.load_state_dict(tensors)
    return hypernetwork.to(device, dtype).eval().requires_grad_(False), about
