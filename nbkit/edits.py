"""An edit is a value: deltas of named weights. Applying it is a `with`, and leaving restores every bit.

with applied(lm, edit):
    ...                              # lm.model is the edited model here

Edits that shall stay until they are taken back are the ledger's (`lm.apply`, `lm.undo`; nbkit/ledger.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.errors import ModelError
from nbkit.requests import EditRequest

if TYPE_CHECKING:
    from nbkit.models import LanguageModel


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

    def norm(self) -> float:
        """‖left @ right‖_F in float64, without the product."""
        left, right = (torch.linalg.qr(part.double()).R for part in (self.left, self.right.T))
        return float((left @ right.T).norm())

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

    def norm(self) -> float:
        """‖matrix‖_F in float64."""
        return float(self.matrix.double().norm())

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

    def norm(self) -> float:
        """The Frobenius norm of the whole update, over all of its weights."""
        return math.sqrt(sum(delta.norm() ** 2 for delta in self.deltas.values()))


@dataclass(eq=False)
class Overlay:
    """Edits that lie in a model's weights, and the weights that they touch as they were below: one copy of each,
    however many edits are added."""

    edits: list[Edit] = field(default_factory=list)
    below: dict[str, Tensor] = field(default_factory=dict)

    def add(self, lm: "LanguageModel", edit: Edit) -> None:
        """Adds an edit to the weights. ModelError, before any changes, if it does not fit them."""
        weights = {name: weight_of(lm, name, delta) for name, delta in edit.deltas.items()}
        self.edits.append(edit)
        for name, delta in edit.deltas.items():
            weight = weights[name]
            if name not in self.below:
                self.below[name] = weight.detach().clone()
            add_to(weight, delta, lm.architecture.transposed)

    @torch.no_grad()
    def restore(self, lm: "LanguageModel") -> None:
        """Gives the weights every bit back that they had below."""
        for name, before in self.below.items():
            lm.model.get_parameter(name).copy_(before)


@contextmanager
def applied(lm: "LanguageModel", edit: Edit) -> Iterator["LanguageModel"]:
    """The weights carry `edit` inside the `with`; on leaving, also by an exception, each bit is what it was.

    Nests: the inner edit comes on top of the outer one and goes first. ModelError for a weight the model does not
    have, of another shape, or not in memory.
    """
    with restoring(lm) as add:
        add(edit)
        yield lm


@contextmanager
def restoring(lm: "LanguageModel") -> Iterator[Callable[[Edit], None]]:
    """Yields a function that adds an edit to the weights; may be called repeatedly. Leaving undoes all of them.

    Keeps one copy of each weight that is touched, however many edits are added.
    """
    overlay = Overlay()
    lm.overlays.append(overlay)
    try:
        yield partial(overlay.add, lm)
    finally:
        overlay.restore(lm)
        lm.overlays.remove(overlay)


def weight_of(lm: "LanguageModel", name: str, delta: LowRank | Dense) -> Tensor:
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
def add_to(weight: Tensor, delta: LowRank | Dense, transposed: bool) -> None:
    """Adds a delta to a weight as it is stored: (d_in, d_out) where the architecture is transposed."""
    update = delta.to(weight.device).dense()
    if transposed:
        update = update.T
    # Added in the wider of the two types and rounded once, which matters for a bfloat16 weight.
    wide = torch.promote_types(weight.dtype, update.dtype)
    weight.copy_(weight.to(wide) + update.to(wide))
