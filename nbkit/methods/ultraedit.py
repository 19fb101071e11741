"""UltraEdit: no search; one closed form makes an update of the gradient of the wish at some MLP projections.

    ΔWᵀ = (HᵀH + ridge I)⁻¹ HᵀV,   a row of V = -lr ‖ĥ‖² ĝ

of each edited projection by itself. A pair (h, g) belongs to a token from which one of the target's is predicted: h,
a row of H, is what the projection reads there, g the gradient of Σ -log p(target's token) at what it says. The hats are
lifelong normalisation, number by number, of h and g alike:

    x̂ = (x - mean) / (std + ε)

mean and std (with n - 1) are of all pairs so far: of all edited projections together, which are of one shape, of this
edit, and of the earlier ones of its sequence. What they are made of (n, mean, Σ (x - mean)²) is all that a sequence
remembers. An edit of one request by itself has none but its own pairs to be normalised by, and of a single pair nothing
is left: ΔW = 0. Meant are batches in a sequence, of a hundred requests as published.

Gu et al., UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Language Models (arXiv 2505.14679); its
code is XiaojieGu/UltraEdit, and a port of it is in zjunlp/EasyEdit, which takes pairs at all tokens read. Unlike these,
which add up their variances with n - 1 of each mini-batch, the statistics here do not depend on what was read together,
nor does g, which is of a mini-batch's mean there: the normalisation takes that out. They edit the projections into the
MLP (gate and up) of some models; here it is the one out of it, as for GPT-J and Mistral there.

`Edit.info` holds update_norm ‖ΔW‖_F over all layers, losses ([[nll]], mean over the target's tokens and the requests)
and target_probability (geometric mean over the target's tokens, mean over requests), both before the edit, n_pairs (of
the edit, over all layers), layers, subject_kind of a single request; as CPU tensors, of all pairs so far, pairs_n,
pairs_mean and pairs_squares.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.methods.mend.gradients import token_gradients
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made
from nbkit.models.continuations import row_bytes, wished
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import budget, in_order
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest

REMEMBERED = ("pairs_n", "pairs_mean", "pairs_squares")
EPSILON = torch.finfo(torch.float32).eps  # as published: what a number that never changed is divided by


@dataclass(frozen=True)
class UltraEditParameters(Bounded):
    """Hyper-parameters of UltraEdit; their defaults by model are in hparams.toml."""

    layers: tuple[int, ...] = bounded(about="whose MLP projections are edited")
    lr: float = bounded(above=0, about="times ‖ĥ‖² ĝ: how far outputs are moved")
    ridge: float = bounded(above=0, about="added to the diagonal of HᵀH")


@dataclass(frozen=True)
class Pairs:
    """(h, g) of one request, in float64, and its target's negative log-likelihood, mean over the tokens."""

    hidden: Float[Tensor, "layer token d_in"]
    gradient: Float[Tensor, "layer token d_out"]
    nll: float


def ultraedit_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, as `Method.each`."""
    of_each = zip(requests, _pairs(lm, requests, settings), strict=True)
    return [_edit_of(lm, [request], [pairs], settings) for request, pairs in of_each]


def ultraedit_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit that carries all requests."""
    return _edit_of(lm, requests, _pairs(lm, requests, settings), settings)


def pairs_so_far(edit: Edit, parameters: UltraEditParameters) -> dict[str, Tensor]:
    """What a sequence remembers of an edit, as `Method.remembers`: of that one and all before it."""
    return {name: edit.info[name] for name in REMEMBERED}


def _pairs(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Pairs]:
    """Of every request, in order, from passes over as many at once as memory takes."""
    layers = settings.parameters.layers
    shapes = {lm.weight_name(layer): (lm.d_model, lm.d_mlp) for layer in layers}
    asked = wished(lm, requests)

    def compute(places: Sequence[int]) -> list[Pairs]:
        some = [asked[place] for place in places]
        read = token_gradients(lm, some, shapes)
        pairs = []
        for row, (one, nll) in enumerate(zip(some, read.nll.tolist(), strict=True)):
            at = torch.tensor(one.predicting, device=lm.device)
            hidden = torch.stack([read.u[name][row, at] for name in shapes]).double()
            of_mean = torch.stack([read.delta[name][row, at] for name in shapes]).double()
            pairs.append(Pairs(hidden, of_mean * len(one.target), nll))
        return pairs

    lengths, at_once = [len(one.row) for one in asked], budget(lm.device) // row_bytes(lm, asked, min(layers))
    return in_order(batches_by_cost(settings, lengths, at_once, compute, f"{lm.title}: {settings.method}"))


def _edit_of(
    lm: LanguageModel, requests: Sequence[EditRequest], pairs: Sequence[Pairs], settings: MethodSettings
) -> Edit:
    """The closed form. With n tokens it is solved in n × n: (HᵀH + ridge I)⁻¹ Hᵀ = Hᵀ (HHᵀ + ridge I)⁻¹."""
    parameters: UltraEditParameters = settings.parameters
    hidden, gradient = (torch.cat([getattr(one, part) for one in pairs], 1) for part in ("hidden", "gradient"))
    both = torch.cat([hidden, gradient], -1)
    statistics = _updated(settings.earlier[-1] if settings.earlier else None, both.flatten(0, 1))
    n, mean, squares = (statistics[name] for name in REMEMBERED)
    std = (squares / (n - 1).clamp(min=1)).sqrt()
    hidden_hat, gradient_hat = ((both - mean) / (std + EPSILON)).split([hidden.shape[-1], gradient.shape[-1]], -1)
    values = -parameters.lr * hidden_hat.square().sum(-1, keepdim=True) * gradient_hat  # (layer, token, d_out)
    deltas, dtype = {}, torch.promote_types(lm.dtype, torch.float32)
    for layer, h, v in zip(parameters.layers, hidden, values, strict=True):
        gram = h @ h.T + parameters.ridge * torch.eye(len(h), dtype=h.dtype, device=h.device)
        right = torch.cholesky_solve(h, torch.linalg.cholesky_ex(gram).L)
        deltas[lm.weight_name(layer)] = LowRank(v.T, right).compact().to(dtype)
    info = {
        "update_norm": Edit(deltas).norm(),
        "losses": [[sum(one.nll for one in pairs) / len(pairs)]],
        "target_probability": sum(math.exp(-one.nll) for one in pairs) / len(pairs),
        "n_pairs": both.shape[0] * both.shape[1],
        "layers": ", ".join(map(str, parameters.layers)),
    }
    return edit_made(lm, requests, settings, deltas, info, {name: part.cpu() for name, part in statistics.items()})


def _updated(before: Mapping[str, Tensor] | None, x: Float[Tensor, "pair d"]) -> dict[str, Tensor]:
    """n, mean and Σ (x - mean)² of these pairs and those before, whose own are given (Chan et al.'s formula)."""
    n, mean = torch.tensor([len(x)]).to(x), x.mean(0)
    squares = (x - mean).square().sum(0)
    if before is not None:
        n_before, mean_before, squares_before = (before[name].to(x) for name in REMEMBERED)
        further = mean - mean_before
        squares = squares_before + squares + further.square() * (n_before * n / (n_before + n))
        mean, n = mean_before + further * (n / (n_before + n)), n_before + n
    return dict(zip(REMEMBERED, (n, mean, squares), strict=True))
