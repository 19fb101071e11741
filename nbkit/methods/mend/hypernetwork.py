"""MEND's hypernetwork: a network on the vectors that a weight's gradient is made of.

The gradient of the target's negative log-likelihood with respect to one weight W is a sum over the tokens t read,

    ∂L/∂W = Σ_t δ_t u_tᵀ        u_t: the module's input, (d_in), δ_t: the gradient at its output, (d_out)

so a network g on vectors of d_in + d_out numbers can stand for one on matrices:

    [ũ; δ̃] = g([u; δ]),    ΔW = -α Σ_t δ̃_t ũ_tᵀ

g first normalises, z = ([u; δ] - mean) / std with the statistics of training, number by number, and then adds low-rank
steps, z ← z + max(0, s ⊙ (U V z + b) + o). The paper gives the last step no nonlinearity; the code published with it,
and those of later editing papers, bound it below by zero like the others, and so it is here. U, b and o start at zero,
so g starts as the normalisation alone; V starts normal with standard deviation 1. Weights of one shape share one g
(U, V, b, mean, std) but have their own scale s, shift o and edit rate α. A token at which the loss has no gradient
(δ = 0: in the last layer all those before the target) gives nothing. Mitchell et al., Fast Model Editing at Scale,
section 3.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbkit.methods.mend.gradients import TokenGradients
from nbkit.models.language_model import LanguageModel


class Transform(nn.Module):
    """g of all edited weights of one shape."""

    def __init__(
        self, d_in: int, d_out: int, n_weights: int, rank: int, n_hidden: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        d, n_steps = d_in + d_out, n_hidden + 1
        rank = min(rank, d)
        self.sizes = [d_in, d_out]
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))
        self.V = nn.Parameter(torch.randn(n_steps, d, rank, generator=generator))
        self.U = nn.Parameter(torch.zeros(n_steps, rank, d))
        self.b = nn.Parameter(torch.zeros(n_steps, d))
        self.s = nn.Parameter(torch.ones(n_steps, n_weights, d))
        self.o = nn.Parameter(torch.zeros(n_steps, n_weights, d))

    def forward(
        self, u: Float[Tensor, "*token d_in"], delta: Float[Tensor, "*token d_out"], place: int
    ) -> tuple[Float[Tensor, "*token d_in"], Float[Tensor, "*token d_out"]]:
        """ũ and δ̃ for the weight at `place` among those of this shape."""
        z = (torch.cat([u, delta], -1) - self.mean) / self.std
        for number in range(len(self.U)):
            low_rank = z @ self.V[number] @ self.U[number] + self.b[number]
            # Every step is zero at first, where relu has no gradient but clamp has.
            z = z + (self.s[number, place] * low_rank + self.o[number, place]).clamp(min=0)
        u, delta = z.split(self.sizes, -1)
        return u, delta


class Hypernetwork(nn.Module):
    """MEND's network for some weights of one model: `shapes` is {weight name: (d_out, d_in)}."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        n_hidden: int = 1,
        first_rate: float = 1e-4,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.rank, self.n_hidden = rank, n_hidden
        alike: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            alike.setdefault(shape, []).append(name)
        self.place = {name: place for names in alike.values() for place, name in enumerate(names)}
        self.transforms = nn.ModuleDict(
            {_key(shape): Transform(*reversed(shape), len(names), rank, n_hidden, generator)
             for shape, names in alike.items()}
        )  # fmt: skip
        # Learned as a logarithm: it stays above 0, and a step changes it by the same share whatever its size.
        self.log_rate = nn.Parameter(torch.full((len(self.shapes),), math.log(first_rate)))

    def transform_of(self, name: str) -> Transform:
        return self.transforms[_key(self.shapes[name])]

    def factors(
        self, gradients: TokenGradients, scale: float = 1.0
    ) -> Iterator[tuple[str, Float[Tensor, "row d_out position"], Float[Tensor, "row position d_in"]]]:
        """For each weight left and right, whose product is each row's ΔW; left is 0 at tokens that give nothing.

        scale: times every α.
        """
        for number, name in enumerate(self.shapes):
            u, delta = gradients.u[name], gradients.delta[name]
            u, delta = self.transform_of(name)(u, delta, self.place[name])
            rate = scale * self.log_rate[number].exp()
            left = torch.where(gradients.gives[name][..., None], -rate * delta, 0)
            yield name, left.mT, u


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def mlp_weights(lm: LanguageModel, layer: int) -> dict[str, tuple[int, int]]:
    """The MLP's matrices of a layer, {weight name: (d_out, d_in)}: those beside its output projection, and that."""
    lm.check_layer(layer)
    parent = lm.architecture.projection_path(layer).rpartition(".")[0]
    children = lm.model.get_submodule(parent).named_children()
    names = [f"{parent}.{name}.weight" for name, module in children if isinstance(module, nn.Linear | Conv1D)]
    return {name: tuple(lm.oriented(name).shape) for name in names}
