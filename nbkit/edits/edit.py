"""`Edit`: what a method made of one or more requests, as a value. Making one changes no model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbkit.edits.updates import Update
from nbkit.errors import MethodError
from nbkit.records.bounds import shown
from nbkit.records.lists import as_list
from nbkit.records.requests import EditRequest


@dataclass(frozen=True, eq=False)
class Edit:
    """Updates of named weights, and where they come from.

    deltas: {weight name: update}. info: what the method measured on the way (for ROME see methods/rome.py).
    hparams: every hyper-parameter it ran with, defaults included.
    """

    deltas: Mapping[str, Update]
    requests: tuple[EditRequest, ...] = ()
    method: str = ""
    hparams: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        asked = ", ".join(f"{one.subject} -> {one.target_new}" for one in self.requests[:3])
        asked += f" and {len(self.requests) - 3} more" if len(self.requests) > 3 else ""
        deltas = [f"{name}: {type(delta).__name__} {tuple(delta.shape)}" for name, delta in self.deltas.items()]
        what = "; ".join([", ".join(deltas) or "no update", f"norm {self.norm():.4g}"])
        return f"<Edit by {self.method or 'hand'} of [{asked}]; {what}>"

    @property
    def request(self) -> EditRequest:
        """The request of an edit that has exactly one."""
        (request,) = self.requests
        return request

    def norm(self) -> float:
        """The Frobenius norm of the whole update, over all of its weights."""
        return math.sqrt(sum(delta.norm() ** 2 for delta in self.deltas.values()))


def as_edits(edits: Any) -> list[Edit]:
    """Edits as a list; MethodError for one by itself, and for what is none."""
    edits = as_list("edits", edits, "Edits", MethodError)
    for index, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            raise MethodError(f"edits must be a list of Edits, and number {index} is {shown(edit)}")
    return edits
