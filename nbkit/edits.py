"""An edit is a value: deltas of named weights. Applying it is a `with`, and leaving restores every bit.

with applied(lm, edit):
    ...                              # lm.model is the edited model here
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.errors import ModelError
from nbkit.models import LanguageModel
from nbkit.requests import EditRequest


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update left @ right of a weight in orientation (d_out, d_in)."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.left @ self.right

    def to(self, device: torch.device | str) -> "LowRank":
        return LowRank(self.left.to(device), self.right.to(device))


@dataclass(frozen=True, eq=False)
class Dense:
    """An update without low rank, in the same orientation."""

    matrix: Float[Tensor, "d_out d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.matrix

    def to(self, device: torch.device | str) -> "Dense":
        return Dense(self.matrix.to(device))


@dataclass(frozen=True, eq=False)
class Edit:
    """What a method made of one or more requests.

    deltas: {weight name: update}. info: what the method measured on the way (for ROME see methods/rome.py).
    hparams: every hyper-parameter it ran with, defaults included.
    """

    deltas: Mapping[str, LowRank | Dense]
    requests: tuple[EditRequest, ...] = ()
    method: str = ""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def request(self) -> EditRequest:
        """The request of an edit that has exactly one."""
        (request,) = self.requests
        return request


@contextmanager
def applied(lm: LanguageModel, edit: Edit) -> Iterator[LanguageModel]:
    """The weights carry `edit` inside the `with`; on leaving, also by an exception, each bit is what it was.

    Nests: the inner edit comes on top of the outer one and goes first. ModelError for a weight the model does not
    have, of another shape, or not in memory.
    """
    with restoring(lm) as add:
        add(edit)
        yield lm


@contextmanager
def restoring(lm: LanguageModel) -> Iterator[Callable[[Edit], None]]:
    """Yields a function that adds an edit to the weights; may be called repeatedly. Leaving undoes all of them.

    Keeps one copy of each weight that is touched, however many edits are added.
    """
    kept: dict[str, Tensor] = {}
    n_before = lm.n_applied

    def add(edit: Edit) -> None:
        weights = {
            name: weight_of(lm, name, delta) for name, delta in edit.deltas.items()
        }  # all checked before any changes
        lm.n_applied += 1
        for name, delta in edit.deltas.items():
            weight = weights[name]
            if name not in kept:
                kept[name] = weight.detach().clone()
            _add(weight, delta, lm.architecture.transposed)

    try:
        yield add
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                lm.model.get_parameter(name).copy_(before)
        lm.n_applied = n_before


def weight_of(lm: LanguageModel, name: str, delta: LowRank | Dense) -> Tensor:
    """The weight that a delta is of; ModelError if the model has none of that name and shape, or not in memory."""
    try:
        weight = lm.model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"the edit changes {name}, a weight that {lm.name} does not have") from error
    if weight.is_meta:
        raise ModelError(f"{lm.name}: {name} is offloaded (on the meta device), where an edit would never reach it")
    shape = tuple(reversed(weight.shape)) if lm.architecture.transposed else tuple(weight.shape)
    if tuple(delta.shape) != shape:
        raise ModelError(
            f"the edit's update of {name} is {tuple(delta.shape)}, the weight of {lm.name} is {shape} (d_out, d_in)"
        )
    return weight


@torch.no_grad()
def _add(weight: Tensor, delta: LowRank | Dense, transposed: bool) -> None:
    update = delta.to(weight.device).dense()
    if transposed:
        update = update.T
    # Added in the wider of the two types and rounded once, which matters for a bfloat16 weight.
    wide = torch.promote_types(weight.dtype, update.dtype)
    weight.copy_(weight.to(wide) + update.to(wide))
