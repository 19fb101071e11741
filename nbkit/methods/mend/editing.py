"""MEND's edits: the gradient of the target's loss, token by token, goes through the trained hypernetwork.

Edited are all matrices of the MLP (input, gate and output projections) in the last layers, three as published.

`Edit.info` holds update_norm (Frobenius, over all weights), losses ([[nll]], before the edit), target_probability
(before the edit: geometric mean over the target's tokens), n_tokens (read) and subject_kind; of a batch the means over
its requests, the sum of the tokens, and subject_kind as a list.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense, LowRank, Update
from nbkit.methods.mend.gradients import TokenGradients, token_gradients
from nbkit.methods.mend.weights_file import load_hypernetwork, weights_path
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made, in_order
from nbkit.models.continuations import row_bytes, wished
from nbkit.models.edited import layer_of
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import budget
from nbkit.models.prompts import subject_kind
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class MendParameters(Bounded):
    """What can be set when editing; all else was when the hypernetwork was trained."""

    weights: str  # file of the trained hypernetwork; "": where `train-mend` puts it
    lr_scale: float = bounded(above=0)  # times every edit rate α


def mend_files(lm: LanguageModel, parameters: MendParameters) -> list[Path]:
    """The hypernetwork's file."""
    return [weights_path(lm.name, parameters.weights)]


def mend_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, all of the model as it is, which is not changed; many in one pass, each by its own tokens."""

    def edits(
        places: Sequence[int], gradients: TokenGradients, updates: Mapping[str, Sequence[LowRank]]
    ) -> Iterator[Edit]:
        nlls = gradients.nll.tolist()
        for row, place in enumerate(places):
            deltas = {name: of_rows[row] for name, of_rows in updates.items()}
            info = _info(deltas, nlls[row : row + 1], gradients.n_tokens[row])
            yield edit_made(lm, [requests[place]], settings, deltas, info)

    return in_order((places, list(edits(places, *made))) for places, *made in _passes(lm, requests, settings))


def mend_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit for all requests: the sum of what each would get alone, for g was trained on single requests.

    Low-rank as long as that takes fewer numbers than the matrix itself.
    """
    deltas: dict[str, Update] = {}
    nlls, n_tokens = [], 0
    for _, gradients, updates in _passes(lm, requests, settings):
        for name, of_rows in updates.items():
            for update in of_rows:
                deltas[name] = _plus(deltas[name], update) if name in deltas else update
        nlls += gradients.nll.tolist()
        n_tokens += sum(gradients.n_tokens)
    info = _info(deltas, nlls, n_tokens)
    if len(requests) > 1:
        info["subject_kind"] = [subject_kind(lm, request) for request in requests]
    return edit_made(lm, requests, settings, deltas, info)


def _passes(
    lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings
) -> Iterator[tuple[list[int], TokenGradients, dict[str, list[LowRank]]]]:
    """Places of the requests of one pass, their gradients and updates; requests of like length share a pass."""
    parameters: MendParameters = settings.parameters
    hypernetwork = load_hypernetwork(lm, parameters.weights)
    asked = wished(lm, requests)

    @torch.no_grad()
    def compute(places: Sequence[int]) -> tuple[TokenGradients, dict[str, list[LowRank]]]:
        gradients = token_gradients(lm, [asked[place] for place in places], hypernetwork.shapes)
        updates: dict[str, list[LowRank]] = {}
        for name, left, right in hypernetwork.factors(gradients, parameters.lr_scale):
            gives = gradients.gives[name]
            updates[name] = [
                LowRank(left[row][:, gives[row]].clone(), right[row][gives[row]].clone()) for row in range(len(places))
            ]
        return gradients, updates

    lengths = [len(one.row) for one in asked]
    at_once = budget(lm.device) // row_bytes(lm, asked, min(layer_of(lm, name) for name in hypernetwork.shapes))
    for places, made in batches_by_cost(settings, lengths, at_once, compute, "mend"):
        yield places, *made


def _info(deltas: Mapping[str, Update], nlls: Sequence[float], n_tokens: int) -> dict[str, object]:
    return {
        "update_norm": Edit(deltas).norm(),
        "losses": [[sum(nlls) / len(nlls)]],
        "target_probability": sum(math.exp(-nll) for nll in nlls) / len(nlls),
        "n_tokens": n_tokens,
    }


def _plus(a: Update, b: LowRank) -> Update:
    """a + b, low-rank as long as that takes fewer numbers than the matrix."""
    if isinstance(a, LowRank) and a.n_numbers + b.n_numbers <= math.prod(b.shape):
        return LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right]))
    return Dense(a.dense() + b.dense())
