"""What a training goes on from after an interrupt: its tensors, its optimiser's state, and how far it is.

    checkpoint = Checkpoint(folder / "checkpoint.safetensors", {**asdict(recipe), "model": lm.base_hash})
    progress = checkpoint.load(tensors, optimizer)          # None: there is none, so begin
    checkpoint.save(tensors, optimizer, {"step": 500})
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nbkit.edits.tensor_files import reading_tensors, write_tensors
from nbkit.errors import ResultsError

STATE = "optimizer."  # what the names of the optimiser's tensors begin with, and no other's


@dataclass(frozen=True)
class Checkpoint:
    """One file of one training."""

    path: Path
    training: Mapping[str, str | int | float]  # all that makes it this training; another one's file is refused

    def save(
        self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, progress: Mapping[str, Any]
    ) -> None:
        """Replaces the last one, whole or not at all. progress: what JSON can hold. ResultsError if it cannot be."""
        stored = dict(tensors)
        for index, state in optimizer.state_dict()["state"].items():
            stored |= {f"{STATE}{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        write_tensors(self.path, stored, {"training": dict(self.training), "progress": dict(progress)})

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """The progress that was saved, with `tensors` and the optimiser's state set in place to what they were then.

        None, and nothing is changed, if there is no file; ResultsError, before anything is changed, for one that is
        damaged, or of another training or model.
        """
        if not self.path.exists():
            return None
        with reading_tensors(self.path, "checkpoint", "delete it to train from the start") as (stored, about):
            training, progress = about["training"], about["progress"]
            states: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for key in [key for key in stored if key.startswith(STATE)]:
                index, name = key.removeprefix(STATE).split(".", 1)
                states[int(index)][name] = stored.pop(key)
        unlike = [name for name, value in self.training.items() if training.get(name) != value]
        if unlike:
            raise ResultsError(
                f"{self.path} is of another training (other {', '.join(unlike)}); delete it, or train in another folder"
            )
        was, now = ({name: tuple(tensor.shape) for name, tensor in some.items()} for some in (stored, tensors))
        unlike = sorted(name for name in was | now if was.get(name) != now.get(name))
        if unlike:
            raise ResultsError(
                f"{self.path} is of another model (see {unlike[0]}); delete it, or train in another folder"
            )
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(states)})
        return progress
