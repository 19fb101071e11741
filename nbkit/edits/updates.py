"""An update of one weight, ΔW in orientation (d_out, d_in), as a value with its arithmetic: of low rank, or dense.

    delta = LowRank(left, right)             # ΔW = left @ right, never multiplied out unless asked
    delta.norm(), delta.scaled(0.5), delta.svd(), total([delta, other])

A bias is a weight with one column here, (d_out, 1): what is added whatever the input is.

Whoever has an update need not know which of the two it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod, sqrt
from typing import NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.errors import MethodError

SIDE_BY_SIDE = 1024  # columns of low-rank updates that are stacked in float64


class Svd(NamedTuple):
    """ΔW = u diag(s) vh in float64, s falling; k is at most the rank of the update's factors."""

    u: Float[Tensor, "d_out k"]
    s: Float[Tensor, " k"]
    vh: Float[Tensor, "k d_in"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update left @ right."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """Of the factors, which the product's cannot exceed."""
        return self.left.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.left.dtype, self.right.dtype)

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def n_numbers(self) -> int:
        """How many are stored."""
        return self.left.numel() + self.right.numel()

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.left @ self.right

    def norm(self) -> float:
        """‖left @ right‖_F in float64, without the product."""
        left, right = (torch.linalg.qr(part.double()).R for part in (self.left, self.right.T))
        return float((left @ right.T).norm())

    def felt_norm(self, second_moment: Float[Tensor, "d_in d_in"]) -> float:
        """‖ΔW C^½‖_F = √(E ‖ΔW k‖²) over the keys k that C = E[k kᵀ] is of: how much the outputs there move."""
        moment, left, right = second_moment.double(), self.left.double(), self.right.double()
        return sqrt(max(float(((right @ moment @ right.T) * (left.T @ left)).sum()), 0.0))

    def to(self, place: torch.device | str | torch.dtype) -> Self:
        """On a device, or in a number type."""
        return LowRank(self.left.to(place), self.right.to(place))

    def isfinite(self) -> bool:
        return bool(self.left.isfinite().all() and self.right.isfinite().all())

    def scaled(self, factor: float) -> Self:
        return LowRank(self.left * factor, self.right)

    def centred(self) -> tuple[Float[Tensor, "d_out 1"], Self]:
        """The mean over d_in, and the rest, in float64."""
        left, right = self.left.double(), self.right.double()
        mean = right.mean(1, keepdim=True)
        return left @ mean, LowRank(left, right - mean)

    def svd(self) -> Svd:
        left, right = torch.linalg.qr(self.left.double()), torch.linalg.qr(self.right.double().T)
        u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
        return Svd(left.Q @ u, s, vh @ right.Q.T)

    def with_svd(self, svd: Svd) -> Self:
        """The update of these singular values and vectors, stored as this one is."""
        return LowRank((svd.u * svd.s).to(self.left.dtype), svd.vh.to(self.right.dtype))

    def compact(self) -> "Update":
        """As factors where they are smaller than their product."""
        return self if self.n_numbers < prod(self.shape) else Dense(self.dense())


@dataclass(frozen=True, eq=False)
class Dense:
    """An update without low rank. Its methods are those of `LowRank`."""

    matrix: Float[Tensor, "d_out d_in"]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)

    @property
    def rank(self) -> int:
        return min(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def n_numbers(self) -> int:
        return self.matrix.numel()

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        return self.matrix

    def norm(self) -> float:
        return float(self.matrix.double().norm())

    def felt_norm(self, second_moment: Float[Tensor, "d_in d_in"]) -> float:
        matrix = self.matrix.double()
        return sqrt(max(float(((matrix @ second_moment.double()) * matrix).sum()), 0.0))

    def to(self, place: torch.device | str | torch.dtype) -> Self:
        return Dense(self.matrix.to(place))

    def isfinite(self) -> bool:
        return bool(self.matrix.isfinite().all())

    def scaled(self, factor: float) -> Self:
        return Dense(self.matrix * factor)

    def centred(self) -> tuple[Float[Tensor, "d_out 1"], Self]:
        matrix = self.matrix.double()
        mean = matrix.mean(1, keepdim=True)
        return mean, Dense(matrix - mean)

    def svd(self) -> Svd:
        return Svd(*torch.linalg.svd(self.matrix.double(), full_matrices=False))

    def with_svd(self, svd: Svd) -> Self:
        return Dense(((svd.u * svd.s) @ svd.vh).to(self.dtype))

    def compact(self) -> "Update":
        return self


Update = LowRank | Dense
Deltas = dict[str, Update]  # by the name of the weight


def total(updates: Sequence[Update], name: str = "one weight") -> Update:
    """The sum of updates of the weight `name`, on the first one's device.

    Low-rank, of the sum of the ranks, if all are; else dense, and added up in float64. MethodError for updates of
    different shapes.
    """
    if len({update.shape for update in updates}) > 1:
        raise MethodError(f"the updates of {name} have different shapes: these edits are of different models")
    if len(updates) == 1:
        return updates[0]
    updates = [update.to(updates[0].device) for update in updates]
    if all(isinstance(update, LowRank) for update in updates):
        return LowRank(torch.cat([u.left for u in updates], 1), torch.cat([u.right for u in updates], 0))
    added = sum(update.dense().double() for update in updates)
    return Dense(added.to(reduce(torch.promote_types, (update.dtype for update in updates))))


def felt_norms(updates: Sequence[Update], second_moment: Float[Tensor, "d_in d_in"]) -> list[float]:
    """`felt_norm` of each of many updates of one weight, on the second moment's device; low-rank ones side by side."""
    norms = [math.nan] * len(updates)
    by_rank: dict[int | None, list[int]] = {}
    for place, update in enumerate(updates):
        by_rank.setdefault(update.rank if isinstance(update, LowRank) else None, []).append(place)
    moment = second_moment.double()
    for place in by_rank.pop(None, []):
        norms[place] = updates[place].to(moment.device).felt_norm(moment)
    for rank, places in by_rank.items():
        size = max(1, SIDE_BY_SIDE // max(rank, 1))
        for chosen in (places[start : start + size] for start in range(0, len(places), size)):
            left = torch.stack([updates[place].left.to(moment) for place in chosen])  # (update, d_out, rank)
            right = torch.stack([updates[place].right.to(moment) for place in chosen])  # (update, rank, d_in)
            squares = ((right @ moment @ right.mT) * (left.mT @ left)).sum((1, 2))
            for place, norm in zip(chosen, squares.clamp(min=0).sqrt().tolist(), strict=True):
                norms[place] = norm
    return norms
