"""What is done with second moments that were computed: solved with, by layer, in float64.

    u = SecondMoments(C, lm).solve(3, key)           # C⁻¹ k by a Cholesky factor, never by an inverse
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.errors import MethodError
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import shown

TOLERATED = 1e-5  # of C that was kept in float32: how far rounding may take it from symmetric and semi-definite


def with_ridge(second_moment: Float[Tensor, "d d"], ridge: float) -> Float[Tensor, "d d"]:
    """C with `ridge` times its mean eigenvalue added to its diagonal, in float64; C is not changed.

    Where ordinary text has next to no keys in some directions, C⁻¹ is made of what few tokens happened to have there.
    """
    return _raised(second_moment, ridge * second_moment.double().diagonal().mean())


def _raised(second_moment: Float[Tensor, "d d"], added: Tensor) -> Float[Tensor, "d d"]:
    """A copy in float64 with so much added to its diagonal, in place: an identity would be as large as C."""
    moment = second_moment.to(torch.float64, copy=True)
    moment.diagonal().add_(added)
    return moment


def check_moment(second_moment: Float[Tensor, "d d"], name: str) -> None:
    """MethodError, calling it `name`, for a matrix that is no mean of k kᵀ: it must be finite, symmetric to
    `TOLERATED` of its largest entry, and positive semi-definite, eigenvalues below zero being rounding up to
    `TOLERATED` of the trace. C of few tokens is singular, and right. Costs one Cholesky factorisation in float64."""
    largest = second_moment.abs().max()
    if not largest.isfinite():
        raise MethodError(f"{name} holds NaN or infinite values; compute it anew")
    if not largest:
        raise MethodError(f"{name} is zero everywhere, which that of no keys is")
    unlike = (second_moment - second_moment.T).abs().max()
    if unlike > TOLERATED * largest:
        raise MethodError(f"{name} is not symmetric (C and its transpose differ by up to {unlike:.3g}), as E[k kᵀ] is")
    raised = _raised(second_moment, TOLERATED * second_moment.double().trace())
    if second_moment.diagonal().min() < 0 or torch.linalg.cholesky_ex(raised).info.item():
        raise MethodError(f"{name} has negative eigenvalues, and E[k kᵀ] has none; was it computed as a mean of k kᵀ?")


def factor(second_moment: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Lower Cholesky factor L of C = L Lᵀ in float64. MethodError if C is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(second_moment.double())
    if info.item() or not lower.isfinite().all():
        raise MethodError(
            f"the second moment ({second_moment.shape[0]} × {second_moment.shape[0]}) cannot be solved with: it is not "
            "positive definite. It needs more tokens, several times as many as it has rows"
        )
    return lower


class SecondMoments:
    """The second moments an edit was given, by layer, each factored once when first needed.

    `given`: None, one matrix (meant for whichever layer is asked for), or {layer: matrix}; NumPy arrays will do.
    Anything else is a MethodError; a matrix is checked when it is first used (`check_moment`).
    """

    def __init__(self, given: Tensor | np.ndarray | Mapping[int, Tensor] | None, lm: LanguageModel):
        for matrix in given.values() if isinstance(given, Mapping) else [given]:
            if not isinstance(matrix, Tensor | np.ndarray) and (matrix is not None or isinstance(given, Mapping)):
                raise MethodError(
                    f"a second moment is a matrix (a tensor or NumPy array) or {{layer: matrix}}, not {shown(matrix)}"
                )
        self._lm = lm
        self._given = given
        self._matrices: dict[int, Tensor] = {}
        self._factors: dict[tuple[int, float], Tensor] = {}
        self._eigen: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, given: "SecondMomentLike", lm: LanguageModel) -> "SecondMoments":
        """What is given as such, which keeps its factors; made of it if it is something else."""
        return given if isinstance(given, SecondMoments) else cls(given, lm)

    def __bool__(self) -> bool:
        return self._given is not None

    @property
    def given(self) -> Tensor | np.ndarray | Mapping[int, Tensor] | None:
        """What they were made of: what determines them, for whoever names results by it."""
        return self._given

    def solve(
        self, layer: int, vectors: Float[Tensor, "*batch d_mlp"], ridge: float = 0.0
    ) -> Float[Tensor, "*batch d_mlp"]:
        """C⁻¹ of one vector, or of each of any number, in float64; C is that `with_ridge`."""
        if (layer, ridge) not in self._factors:
            self._factors[layer, ridge] = factor(with_ridge(self.matrix(layer), ridge))
        columns = vectors.double().reshape(-1, vectors.shape[-1]).T
        return torch.cholesky_solve(columns, self._factors[layer, ridge]).T.reshape(vectors.shape)

    def small_directions(self, layer: int, threshold: float) -> Float[Tensor, "d_mlp m"]:
        """Orthonormal eigenvectors of C whose eigenvalue is below `threshold`, where ordinary text has few keys.

        In float64, decomposed once a layer. MethodError if there are none.
        """
        if layer not in self._eigen:
            self._eigen[layer] = torch.linalg.eigh(self.matrix(layer).double())
        values, vectors = self._eigen[layer]
        if not (values < threshold).any():
            raise MethodError(
                f"no eigenvalue of the second moment at layer {layer} is below {threshold:g}; the smallest is "
                f"{values[0].item():.3g}, so nullspace_threshold must be larger"
            )
        return vectors[:, values < threshold]

    def matrix(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        """C of a layer on the model's device; MethodError if none of its size was given, or what was given is none."""
        if layer not in self._matrices:
            self._matrices[layer] = self._checked(layer)
        return self._matrices[layer]

    def _checked(self, layer: int) -> Float[Tensor, "d_mlp d_mlp"]:
        matrix = self._given
        if isinstance(matrix, Mapping):
            if layer not in matrix:
                raise MethodError(f"no second moment is given for layer {layer}, only for {list(matrix)}")
            matrix = matrix[layer]
        try:
            matrix = torch.as_tensor(matrix, device=self._lm.device)
        except (TypeError, ValueError) as error:
            raise MethodError(f"the second moment of layer {layer} is no matrix of numbers: {error}") from error
        if matrix.is_complex() or matrix.dtype == torch.bool:
            raise MethodError(f"the second moment of layer {layer} must hold real numbers, not {matrix.dtype}")
        expected = (self._lm.d_mlp, self._lm.d_mlp)
        if tuple(matrix.shape) != expected:
            raise MethodError(
                f"the second moment of {self._lm.name} must be {expected}, not {tuple(matrix.shape)}; "
                "is it another model's?"
            )
        check_moment(matrix, f"the second moment of layer {layer}")
        return matrix


SecondMomentLike = Tensor | np.ndarray | Mapping[int, Tensor] | SecondMoments | None
