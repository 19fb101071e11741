"""MEND's edits: the gradient of the target's loss, token by token, goes through the trained hypernetwork.

Edited are all matrices of the MLP (input, gate and output projections) in the last layers, three as published.

`Edit.info` holds update_norm (Frobenius, over all weights), losses ([[nll]], before the edit), target_probability
(before the edit: geometric mean over the target's tokens), n_tokens (read) and subject_kind; of a batch the means over
its requests, the sum of the tokens, and subject_kind as a list.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError
from nbkit.methods.mend.gradients import Continuation, TokenGradients, continuations, token_gradients
from nbkit.methods.mend.hypernetwork import Hypernetwork
from nbkit.methods.mend.weights_file import load_hypernetwork, weights_path
from nbkit.methods.method import Setting, side_by_side
from nbkit.models.edited import layer_of
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget
from nbkit.models.prompts import named, subject_kind
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class MendParameters:
    """What can be set when editing; all else was when the hypernetwork was trained."""

    weights: str  # file of the trained hypernetwork; "": where `train-mend` puts it
    lr_scale: float  # times every edit rate α

    def __post_init__(self):
        if not self.lr_scale > 0:
            raise MethodError(f"lr_scale must be above 0, not {self.lr_scale}")


def mend_files(lm: LanguageModel, parameters: MendParameters) -> list[Path]:
    """The hypernetwork's file."""
    return [weights_path(lm.name, parameters.weights)]


def mend_each(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[Edit]:
    """One edit a request, all of the model as it is, which is not changed; many in one pass, each by its own tokens."""
    parameters: MendParameters = setting.parameters
    edits: dict[int, Edit] = {}
    for places, gradients, updates in _passes(lm, requests, setting):
        nlls = gradients.nll.tolist()
        for row, place in enumerate(places):
            deltas = {name: of_rows[row] for name, of_rows in updates.items()}
            info = _info(deltas, nlls[row : row + 1], gradients.n_tokens[row])
            info["subject_kind"] = subject_kind(lm, requests[place])
            edits[place] = Edit(deltas, (requests[place],), "mend", asdict(parameters), info)
    return [edits[place] for place in range(len(requests))]


def mend_together(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> Edit:
    """One edit for all requests: the sum of what each would get alone, for g was trained on single requests.

    Low-rank as long as that takes fewer numbers than the matrix itself.
    """
    parameters: MendParameters = setting.parameters
    deltas: dict[str, LowRank | Dense] = {}
    nlls, n_tokens = [], 0
    for _, gradients, updates in _passes(lm, requests, setting):
        for name, of_rows in updates.items():
            for update in of_rows:
                deltas[name] = _plus(deltas[name], update) if name in deltas else update
        nlls += gradients.nll.tolist()
        n_tokens += sum(gradients.n_tokens)
    info = _info(deltas, nlls, n_tokens)
    info["subject_kind"] = [subject_kind(lm, request) for request in requests]
    return Edit(deltas, tuple(requests), "mend", asdict(parameters), info)


def _passes(
    lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting
) -> Iterator[tuple[list[int], TokenGradients, dict[str, list[LowRank]]]]:
    """Places of the requests of one pass, their gradients and updates; requests of like length share a pass."""
    parameters: MendParameters = setting.parameters
    hypernetwork = load_hypernetwork(lm, parameters.weights)
    asked = []
    for request in requests:
        with named(request):
            asked += continuations(lm, [request.text], [request.target_new])

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
    for places, made in side_by_side(setting, lengths, _edits_at_once(lm, asked, hypernetwork), compute, "mend"):
        yield places, *made


def _edits_at_once(lm: LanguageModel, asked: Sequence[Continuation], hypernetwork: Hypernetwork) -> int:
    longest, n_logits = max((len(one.row) for one in asked), default=1), max((len(a.target) for a in asked), default=1)
    n_layers = lm.n_layers - min(layer_of(lm, name) for name in hypernetwork.shapes)  # that gradients go through
    return budget(lm.device) // Footprint(longest, 0, n_layers, n_logits, backward=True).bytes(lm)


def _info(deltas: Mapping[str, LowRank | Dense], nlls: Sequence[float], n_tokens: int) -> dict[str, object]:
    return {
        "update_norm": math.sqrt(sum(delta.norm() ** 2 for delta in deltas.values())),
        "losses": [[sum(nlls) / len(nlls)]],
        "target_probability": sum(math.exp(-nll) for nll in nlls) / len(nlls),
        "n_tokens": n_tokens,
    }


def _plus(a: LowRank | Dense, b: LowRank) -> LowRank | Dense:
    """a + b, low-rank as long as that takes fewer numbers than the matrix."""
    d_out, d_in = b.shape
    if isinstance(a, LowRank) and (a.left.shape[1] + b.left.shape[1]) * (d_out + d_in) <= d_out * d_in:
        return LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right]))
    return Dense(a.dense() + b.dense())
