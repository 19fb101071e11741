"""Gradients token by token: of each text's own target, at the inputs and outputs of chosen modules, in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nbkit.keys.extract import widened
from nbkit.models.continuations import Continuation
from nbkit.models.hooks import capture, replace, together
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.models.rows import Batch, marked


def target_nlls(lm: LanguageModel, batch: Batch, asked: Sequence[Continuation]) -> Float[Tensor, " row"]:
    """Mean negative log-likelihood of each row's target tokens, by a plain pass of the model as it is."""
    keep = marked([one.predicting for one in asked], batch.shape[1], lm.device)
    log_probabilities = widened(lm.logits(batch, keep=keep)).log_softmax(-1)  # (token, vocabulary)
    tokens = torch.tensor([token for one in asked for token in one.target], device=lm.device)
    rows = torch.tensor([row for row, one in enumerate(asked) for _ in one.target], device=lm.device)
    of_tokens = log_probabilities.gather(-1, tokens[:, None])[:, 0]
    sums = torch.zeros(len(asked), dtype=of_tokens.dtype, device=lm.device).index_add(0, rows, of_tokens)
    return -sums / torch.tensor([len(one.target) for one in asked], device=lm.device)


@dataclass(frozen=True)
class TokenGradients:
    """Of one pass over some rows, by weight: u and δ of each token, and which tokens give to the gradient."""

    u: dict[str, Float[Tensor, "row position d_in"]]
    delta: dict[str, Float[Tensor, "row position d_out"]]
    gives: dict[str, Bool[Tensor, "row position"]]
    nll: Float[Tensor, " row"]
    n_tokens: list[int]  # read, by row


def token_gradients(
    lm: LanguageModel, asked: Sequence[Continuation], shapes: Mapping[str, tuple[int, int]]
) -> TokenGradients:
    """Every row's gradient of its own loss, as u and δ at its tokens. shapes: (d_out, d_in) by weight.

    Reads δ off zeros added to each module's output; nothing in the model is changed.
    """
    batch = pad(lm, [one.row for one in asked])
    modules = {name: lm.model.get_submodule(name.removesuffix(".weight")) for name in shapes}
    zeros = {
        name: torch.zeros(*batch.shape, d_out, dtype=lm.dtype, device=lm.device, requires_grad=True)
        for name, (d_out, _) in shapes.items()
    }
    inputs = [capture(module, "input", shape=batch.shape) for module in modules.values()]
    added = [replace(modules[name], zero.add, shape=batch.shape) for name, zero in zeros.items()]
    with torch.enable_grad(), together(inputs) as kept, together(added):
        nll = target_nlls(lm, batch, asked)
        gradients = torch.autograd.grad(nll.sum(), list(zeros.values()))
    u = {name: widened(one.value.detach()) for name, one in zip(shapes, kept, strict=True)}
    delta = {name: widened(gradient) for name, gradient in zip(shapes, gradients, strict=True)}
    read = batch.attention_mask.bool()
    gives = {name: read & (u[name] != 0).any(-1) & (delta[name] != 0).any(-1) for name in shapes}
    return TokenGradients(u, delta, gives, nll.detach(), batch.lengths.tolist())
