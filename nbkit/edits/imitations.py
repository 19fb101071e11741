"""Regularisers that put something else in an update's place which is like it in one respect, and random in all others.

    regularise(edit, lm, "imitate", kind="gaussian", seed=0)

Controls: what an imitation does to a model as the edit does comes of what they share, not of the edit's direction.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.selection import seeded
from nbkit.edits.spectra import check_finite
from nbkit.edits.updates import Deltas, Dense, Svd, Update
from nbkit.errors import MethodError
from nbkit.records.bounds import check_choice, shown


def imitate(edit: Edit, lm: EditableModel, *, kind: str, seed: int, same_norm: bool = False) -> tuple[Deltas, dict]:
    """Of each weight, an update drawn at random that shares with ΔW, depending on `kind`:

    "gaussian": the Frobenius norm, of Gaussian noise.
    "spectrum": the singular values, with left and right singular vectors drawn uniformly. Low rank stays low.
    "shuffled": the entries, each at another place of the same weight.
    "profile": the multiset of δ = |ΔW / W|: ΔW'_ij = ± W_ij δ_π(ij), π a permutation of the places where W is not 0,
        signs random. Where W = 0 there is no δ, and ΔW stays. Its norm is another, mostly larger, as the largest δ
        belong to the smallest weights.

    same_norm: it is then scaled to the Frobenius norm of ΔW, so that a profile shares the δ up to one factor; the other
    kinds have that norm as they are.

    The same seed draws the same on every device. MethodError for the spectrum of an update that is not finite.
    """
    check_choice("kind", kind, tuple(_KINDS))
    if not isinstance(same_norm, bool):
        raise MethodError(f"same_norm must be True or False, not {shown(same_norm)}")
    generator, deltas = seeded(seed), {}
    for name, delta in edit.deltas.items():
        if kind == "spectrum":
            check_finite(name, delta)
        made = _KINDS[kind](delta.to(lm.device), lm.oriented(name).detach(), generator)
        deltas[name] = made.scaled(delta.norm() / made.norm()) if same_norm and made.norm() else made
    return deltas, {}


def gaussian(shape: tuple[int, int], norm: float, generator: torch.Generator) -> Float[Tensor, "d_out d_in"]:
    """Gaussian noise of a Frobenius norm, in float64 on the CPU."""
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn * (norm / float(drawn.norm()))


def _gaussian(delta: Update, weight: Tensor, generator: torch.Generator) -> Update:
    return Dense(gaussian(delta.shape, delta.norm(), generator).to(delta.device, delta.dtype))


def _spectrum(delta: Update, weight: Tensor, generator: torch.Generator) -> Update:
    s = delta.svd().s
    u, v = (_orthonormal(size, len(s), generator).to(s.device) for size in delta.shape)
    return delta.with_svd(Svd(u, s, v.T))


def _orthonormal(size: int, n: int, generator: torch.Generator) -> Float[Tensor, "size n"]:
    """n orthonormal columns, uniform over all such: of a QR decomposition whose R has a positive diagonal."""
    q, r = torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _shuffled(delta: Update, weight: Tensor, generator: torch.Generator) -> Update:
    entries = delta.dense().reshape(-1)
    return Dense(entries[_order(entries, generator)].view(delta.shape))


def _profile(delta: Update, weight: Tensor, generator: torch.Generator) -> Update:
    update, weight = delta.dense().double(), weight.double()
    places = weight != 0
    ratios = update[places] / weight[places]
    signs = torch.randint(0, 2, ratios.shape, generator=generator).to(ratios) * 2 - 1
    update = update.clone()
    update[places] = signs * weight[places] * ratios[_order(ratios, generator)]
    return Dense(update.to(delta.dtype))


def _order(entries: Float[Tensor, " n"], generator: torch.Generator) -> Tensor:
    return torch.randperm(len(entries), generator=generator).to(entries.device)


_KINDS = {"gaussian": _gaussian, "spectrum": _spectrum, "shuffled": _shuffled, "profile": _profile}
