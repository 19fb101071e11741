"""Models kept in memory between the runs of one kernel, so that a grid of runs loads each of them once.

`load` asks `take` first and tells `lend` afterwards; the kernel of a sweep calls `take_back` between two runs, whose
variables are then gone. A model is handed out once in a run, so that two of a notebook never share weights, and only
if its weights hash as they did when it was loaded. What a run did not use makes room for the next. Nothing is kept
unless the environment has NBKIT_KEEP_MODELS.
"""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nbkit.errors import ModelError
from nbkit.models.language_model import LanguageModel
from nbkit.records.files import states

SETTING = "NBKIT_KEEP_MODELS"


@dataclass(frozen=True)
class Kept:
    """A model that no run holds any more."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    hash: str


# By all that determines what `load` gives. Of the lent ones the model is held weakly: a run may drop it to make room.
_free: dict[tuple, Kept] = {}
_lent: dict[tuple, tuple[weakref.ref, PreTrainedTokenizerBase, str]] = {}


def state_of(place: Path | str) -> tuple:
    """Names, sizes and times of a local folder's files: a model that was trained on is another one."""
    return (str(place), *(states(place) if isinstance(place, Path) else ()))


def take(key: tuple, name: str, side: Any) -> LanguageModel | None:
    """The kept model of that key, unedited; None if there is none, and then the others are dropped to make room."""
    found = _free.pop(key, None)
    if found is not None:
        lm = LanguageModel.wrap(found.model, found.tokenizer, name, side)
        if _unchanged(lm, found.hash):
            lend(key, lm)
            return lm
    _free.clear()
    return None


def _unchanged(lm: LanguageModel, was: str) -> bool:
    try:
        return lm.hash == was
    except ModelError:  # a hook that the run before left on it: it is loaded anew
        return False


def lend(key: tuple, lm: LanguageModel) -> None:
    """Remembers a model that a run is given."""
    if os.environ.get(SETTING):
        _lent[key] = (weakref.ref(lm.model), lm.tokenizer, lm.base_hash)


def take_back() -> None:
    """Keeps the models that the run before was given and did not drop, and none from before that."""
    _free.clear()
    alive = {key: (model(), *rest) for key, (model, *rest) in _lent.items()}
    _free.update({key: Kept(*parts) for key, parts in alive.items() if parts[0] is not None})
    _lent.clear()
