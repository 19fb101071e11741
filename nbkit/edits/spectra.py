"""Regularisers of an update's principal components, singular values and directions.

    regularise(edit, lm, "pca", n_components=20)
    regularise(accumulated(edits), lm, "prune")         # PRUNE: of a whole sequence
    regularise(edit, lm, "sphere")                      # SPHERE: less along the principal directions of the weight

Sources: Gu et al., arXiv 2401.04700 (PCA, a baseline of RECT); Ma et al., Perturbation-Restrained Sequential Model
Editing, arXiv 2405.16821 (PRUNE); Energy-Regularized Sequential Model Editing on Hyperspheres, arXiv 2510.01172
(SPHERE).
"""

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.editable import EditableModel
from nbkit.edits.updates import Deltas, Dense, LowRank, Update
from nbkit.errors import MethodError, ModelError
from nbkit.records.bounds import check_choice, check_number


def pca(edit: Edit, lm: EditableModel, *, n_components: int, variant: str = "proper") -> tuple[Deltas, dict]:
    """Principal components of each update, whose rows are those of ΔWᵀ (d_in, d_out): d_in samples of d_out features.

    That is the orientation in which GPT-2 stores its weights, taken here for every architecture.
    variant "proper": ΔWᵀ is projected on the first components and transformed back, its mean row included; a rank-one
    update loses nothing. "as_released": what RECT's published code does, the scores written into the first n_components
    columns of zeros, without the way back; they are coordinates in another basis than the model's, so that little is
    left of the edit. The sign of a component, free in theory, is that which makes its largest entry positive.

    The update of a bias, a single sample, has no components and stays as it is.
    """
    check_choice("variant", variant, ("proper", "as_released"))
    check_number("n_components", n_components, least=1, whole=True)
    deltas = {}
    for name, delta in edit.deltas.items():
        if lm.model.get_parameter(name).dim() == 1:
            deltas[name] = delta
            continue
        if n_components > min(delta.shape):
            raise MethodError(f"n_components is {n_components}, but {name} is {delta.shape} and has no more than that")
        check_finite(name, delta)
        mean, centred = delta.centred()
        # ΔW less its mean = U diag(s) Vᵀ: the components are U's columns, the scores V diag(s).
        u, s, vh = centred.svd()
        u, s, vh = u[:, :n_components], s[:n_components], vh[:n_components]
        if variant == "proper":
            update = (u * s) @ vh + mean
        else:
            largest = u.gather(0, u.abs().argmax(0, keepdim=True))
            update = torch.zeros(delta.shape, dtype=u.dtype, device=u.device)
            update[: len(s)] = (s[:, None] * vh) * torch.where(largest < 0, -1.0, 1.0).T
        deltas[name] = Dense(update.to(delta.dtype))
    return deltas, {}


def prune(edit: Edit, lm: EditableModel, *, base: float = math.e, function: str = "log") -> tuple[Deltas, dict]:
    """PRUNE: the large singular values of an accumulated update (`accumulated(edits)`) are held back.

    ΔW = U diag(s) Vᵀ, and m is the largest singular value of the unedited weight W₀. Each s_i ≥ m becomes
    log_a(s_i) - log_a(m) + m for function "log" (a = `base` > 1; the paper takes e, 2, 1.5 or 1.2), or (s_i + m) / 2
    for "linear"; smaller ones stay, and an update without larger ones is returned as it is. Low rank stays low.

    Near m the logarithm has the slope 1 / (m ln a): where m < 1 / ln a it makes singular values LARGER. The formula is
    kept as published, and a warning says so when it happens.

    info: regulariser_limit, m of each weight, and regulariser_restrained, how many singular values were changed.
    ModelError for a model that carries edits: W₀ is its unedited weight.
    """
    if lm.n_applied:
        raise ModelError(f"prune compares with the unedited weights, but {lm.name} carries {lm.n_applied} edit(s)")
    check_choice("function", function, ("log", "linear"))
    check_number("base", base, above=1, below=math.inf)
    deltas, limits, restrained = {}, [], []
    for name, delta in edit.deltas.items():
        check_finite(name, delta)
        limit = float(torch.linalg.matrix_norm(lm.oriented(name).double(), 2))
        svd = delta.svd()
        s = svd.s
        large = s >= limit
        changed = (s + limit) / 2 if function == "linear" else (s / limit).log() / math.log(base) + limit
        if (changed > s)[large].any():
            warnings.warn(
                f"prune enlarges singular values of {name}: its unedited weight has none above {limit:.3g}, where "
                f"log to the base {base:.3g} is steep; use a larger base, or function='linear'",
                stacklevel=3,
            )
        deltas[name] = delta.with_svd(svd._replace(s=torch.where(large, changed, s))) if large.any() else delta
        limits.append(limit)
        restrained.append(int(large.sum()))
    return deltas, {"limit": limits, "restrained": restrained}


def sphere(edit: Edit, lm: EditableModel, *, energy: float = 0.5, alpha: float = 0.5) -> tuple[Deltas, dict]:
    """SPHERE: ΔW (I - α U Uᵀ), which holds back what an update does along the principal directions of its weight.

    Ŵ is the weight in lm, which in a sequence carries the earlier edits, with its rows (the d_out neurons) divided by
    their norms; U (d_in, r) are the eigenvectors of ŴᵀŴ with the largest eigenvalues, the fewest whose share of their
    sum exceeds `energy`. alpha: 0 leaves the update as it is, 1 takes all along U out of it; the paper has 0.5 for
    AlphaEdit, 0.8 for MEMIT, and an energy of 0.5. The published code takes the rows of the matrix as it is stored,
    which are the neurons in the models that it has settings for; here they are so on GPT-2 and GPT-J too.

    Low rank stays low. A bias, which has no directions, stays as it is. info: regulariser_directions, r of each matrix.
    MethodError for a weight that is not finite.
    """
    check_number("energy", energy, above=0, below=1)
    check_number("alpha", alpha, least=0, most=1)
    deltas, directions = {}, []
    for name, delta in edit.deltas.items():
        if lm.model.get_parameter(name).dim() == 1:
            deltas[name] = delta
            continue
        u, delta = _principal(name, lm.oriented(name).detach().double(), energy), delta.to(lm.device)
        part = delta.right if isinstance(delta, LowRank) else delta.matrix
        spared = (part.double() - alpha * (part.double() @ u) @ u.T).to(part.dtype)
        deltas[name] = LowRank(delta.left, spared) if isinstance(delta, LowRank) else Dense(spared)
        directions.append(u.shape[1])
    return deltas, {"directions": directions}


def _principal(name: str, weight: Float[Tensor, "d_out d_in"], energy: float) -> Float[Tensor, "d_in r"]:
    """Orthonormal, of the rows of unit norm; by the smaller of the two matrices that have these eigenvalues."""
    if not weight.isfinite().all():
        raise MethodError(f"{name} holds NaN or infinite values, and so has no principal directions")
    rows = torch.nn.functional.normalize(weight)
    wide = rows.shape[0] < rows.shape[1]
    values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = values.flip(0), vectors.flip(1)
    r = int((values.cumsum(0) <= energy * values.sum()).sum()) + 1
    return rows.T @ vectors[:, :r] / values[:r].sqrt() if wide else vectors[:, :r]


def check_finite(name: str, delta: Update) -> None:
    if not delta.isfinite():
        raise MethodError(f"the update of {name} holds NaN or infinite values, of which there are no singular values")
