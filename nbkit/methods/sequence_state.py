"""Where a sequence of edits is: all that it needs to go on from there, as a value and as a file.

    for step in edit_sequence(lm, requests, method="memit"):
        state = step.state()                                       # copies of the weights that were changed so far
    save_state(state, "state.safetensors", "of this study")
    for step in edit_sequence(lm, requests, method="memit", start=load_state("state.safetensors", "of this study")):
        ...                                                        # from the first request that the state has not seen

Weights are stored, not updates: what a sequence holds does not grow with its length, but for what a method remembers of
each edit (the keys that MEMIT with `key_cache` and AlphaEdit spare). Nothing in the file is ever executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.edits.updates import Dense
from nbkit.errors import ModelError, ResultsError

FORMAT = 1
PASSES = 4  # sums that bring a weight to given bits: one nearly does, a second corrects its rounding


@dataclass(frozen=True, eq=False)
class SequenceState:
    """n_steps: the edits behind it, refused ones included. weights: {name: weight now, as stored in the model, on the
    CPU} of all that they changed. remembered: of each edit that was made, what `Method.remembers` gives."""

    n_steps: int
    weights: Mapping[str, Tensor]
    remembered: tuple[Mapping[str, Tensor], ...] = ()

    @property
    def n_bytes(self) -> int:
        tensors = [*self.weights.values(), *(tensor for one in self.remembered for tensor in one.values())]
        return sum(tensor.nbytes for tensor in tensors)


def lay(lm: EditableModel, state: SequenceState, add: Callable[[Edit], None]) -> None:
    """Brings the weights to those of the state, bit for bit, by edits that `add` (of `restoring`) adds.

    ModelError for a state of another model: a weight that it lacks, or of another shape or number type.
    """
    for name, target in state.weights.items():
        _check(lm, name, target)
        wanted = _oriented(lm, target.to(lm.model.get_parameter(name).device))
        for _ in range(PASSES):
            now = lm.oriented(name)
            same = (now == wanted) | (now.isnan() & wanted.isnan())
            if same.all():
                break
            difference = wanted.double() - now.double()
            add(Edit({name: Dense(torch.where(same, 0.0, difference))}))
        else:
            raise ModelError(f"{lm.name}: {name} cannot be brought to what the state of a sequence holds")


def _check(lm: EditableModel, name: str, target: Tensor) -> None:
    try:
        weight = lm.model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"the state of a sequence holds {name}, a weight that {lm.name} does not have") from error
    if (weight.shape, weight.dtype) != (target.shape, target.dtype):
        raise ModelError(
            f"the state of a sequence holds {name} as {tuple(target.shape)} {target.dtype}, and that of {lm.name} is "
            f"{tuple(weight.shape)} {weight.dtype}: it is of another model"
        )


def _oriented(lm: EditableModel, stored: Tensor) -> Tensor:
    """As `lm.oriented`, of a weight that is not in the model."""
    if stored.dim() == 1:
        return stored[:, None]
    return stored.T if lm.architecture.transposed else stored


def save_state(state: SequenceState, path: Path, of: str) -> None:
    """Writes a state to a file, whole or not at all; one of that name is replaced. of: what names its sequence.

    ResultsError if it cannot be written.
    """
    tensors = {f"weight {name}": tensor for name, tensor in state.weights.items()}
    tensors |= {f"{number} {name}": one[name] for number, one in enumerate(state.remembered) for name in one}
    about = {
        "format": FORMAT,
        "of": of,
        "n_steps": state.n_steps,
        "remembered": [list(one) for one in state.remembered],
    }
    write_tensors(path, tensors, {"state": about})


def load_state(path: Path, of: str) -> SequenceState:
    """The state in a file, on the CPU. ResultsError if it is not there, damaged, or of another sequence than `of`."""
    advice = "delete it, and the sequence begins anew"
    with reading_tensors(path, "state of a sequence", advice) as (tensors, content):
        about = content["state"]
        if about["format"] != FORMAT or about["of"] != of:
            raise ResultsError(f"{path} is the state of another sequence, model or version of the code; {advice}")
        weights = {name.removeprefix("weight "): t for name, t in tensors.items() if name.startswith("weight ")}
        remembered = tuple(
            {name: tensors[f"{number} {name}"] for name in names} for number, names in enumerate(about["remembered"])
        )
        return SequenceState(int(about["n_steps"]), weights, remembered)
