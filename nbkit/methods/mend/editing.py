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
from nbkit.methods.mend.gradients import token_gradients
from nbkit.methods.mend.weights_file import load_hypernetwork, weights_path
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made
from nbkit.models.continuations import row_bytes, wished
from nbkit.models.edited import layer_of
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import budget, in_order
from nbkit.models.prompts import subject_kind
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class MendParameters(Bounded):
    """What can be set when editing; all else was when the hypernetwork was trained."""

    weights: str = bounded(about="file of the trained hypernetwork; empty: where train-mend puts it")
    lr_scale: float = bounded(above=0, about="times every edit rate α")


def mend_files(lm: LanguageModel, parameters: MendParameters) -> list[Path]:
    """The hypernetwork's file."""
    return [weights_path(lm.name, parameters.weights)]


def mend_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, all of the model as it is, which is not changed; many in one pass, each by its own tokens."""
    return in_order(
        ([place], [edit_made(lm, [requests[place]], settings, deltas, _info(deltas, [nll], n_tokens))])
        for place, deltas, nll, n_tokens in _updates(lm, requests, settings)
    )


def mend_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit for all requests: the sum of what each would get alone, for g was trained on single requests.

    Low-rank as long as that takes fewer numbers than the matrix itself.
    """
    summed: dict[str, Update] = {}
    nlls, n_tokens = [], 0
    for _, deltas, nll, n_read in _updates(lm, requests, settings):
        for name, delta in deltas.items():
            summed[name] = _plus(summed[name], delta) if name in summed else delta
        nlls.append(nll)
        n_tokens += n_read
    kinds = {"subject_kind": [subject_kind(lm, request) for request in requests]}
    return edit_made(lm, requests, settings, summed, _info(summed, nlls, n_tokens) | kinds)


def _updates(
    lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings
) -> Iterator[tuple[int, dict[str, LowRank], float, int]]:
    """Of each request its place, its updates, the target's nll and the tokens read; those of like length come together,
    from one pass."""
    parameters: MendParameters = settings.parameters
    hypernetwork = load_hypernetwork(lm, parameters.weights)
    asked = wished(lm, requests)

    @torch.no_grad()
    def compute(places: Sequence[int]) -> list[tuple[int, dict[str, LowRank], float, int]]:
        gradients = token_gradients(lm, [asked[place] for place in places], hypernetwork.shapes)
        deltas: list[dict[str, LowRank]] = [{} for _ in places]
        for name, left, right in hypernetwork.factors(gradients, parameters.lr_scale):
            for row, gives in enumerate(gradients.gives[name]):
                deltas[row][name] = LowRank(left[row][:, gives].clone(), right[row][gives].clone())
        return list(zip(places, deltas, gradients.nll.tolist(), gradients.n_tokens, strict=True))

    lengths = [len(one.row) for one in asked]
    at_once = budget(lm.device) // row_bytes(lm, asked, min(layer_of(lm, name) for name in hypernetwork.shapes))
    for _, made in batches_by_cost(settings, lengths, at_once, compute, f"{lm.title}: mend"):
        yield from made


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
