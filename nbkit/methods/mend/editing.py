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
from nbkit.methods.mend.gradients import Continuation, continuations, token_gradients
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
    edits: dict[int, Edit] = {}
    for place, deltas, nll, n_tokens in _updates(lm, requests, setting):
        info = _info(deltas, [nll], n_tokens, subject_kind(lm, requests[place]))
        edits[place] = Edit(deltas, (requests[place],), "mend", asdict(setting.parameters), info)
    return [edits[place] for place in range(len(requests))]


def mend_together(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> Edit:
    """One edit for all requests: the sum of what each would get alone, for g was trained on single requests.

    Low-rank as long as that takes fewer numbers than the matrix itself.
    """
    summed: dict[str, LowRank | Dense] = {}
    nlls, n_tokens = [], 0
    for _, deltas, nll, n_read in _updates(lm, requests, setting):
        for name, delta in deltas.items():
            summed[name] = _plus(summed[name], delta) if name in summed else delta
        nlls.append(nll)
        n_tokens += n_read
    info = _info(summed, nlls, n_tokens, [subject_kind(lm, request) for request in requests])
    return Edit(summed, tuple(requests), "mend", asdict(setting.parameters), info)


def _updates(
    lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting
) -> Iterator[tuple[int, dict[str, LowRank], float, int]]:
    """Of each request its place, its updates, the target's nll and the tokens read; those of like length come together,
    from one pass."""
    parameters: MendParameters = setting.parameters
    hypernetwork = load_hypernetwork(lm, parameters.weights)
    asked = []
    for request in requests:
        with named(request):
            asked += continuations(lm, [request.text], [request.target_new])

    @torch.no_grad()
    def compute(places: Sequence[int]) -> list[tuple[int, dict[str, LowRank], float, int]]:
        gradients = token_gradients(lm, [asked[place] for place in places], hypernetwork.shapes)
        deltas: list[dict[str, LowRank]] = [{} for _ in places]
        for name, left, right in hypernetwork.factors(gradients, parameters.lr_scale):
            for row, gives in enumerate(gradients.gives[name]):
                deltas[row][name] = LowRank(left[row][:, gives].clone(), right[row][gives].clone())
        return list(zip(places, deltas, gradients.nll.tolist(), gradients.n_tokens, strict=True))

    lengths = [len(one.row) for one in asked]
    for _, made in side_by_side(setting, lengths, _edits_at_once(lm, asked, hypernetwork), compute, "mend"):
        yield from made


def _edits_at_once(lm: LanguageModel, asked: Sequence[Continuation], hypernetwork: Hypernetwork) -> int:
    longest, n_logits = max((len(one.row) for one in asked), default=1), max((len(a.target) for a in asked), default=1)
    n_layers = lm.n_layers - min(layer_of(lm, name) for name in hypernetwork.shapes)  # that gradients go through
    return budget(lm.device) // Footprint(longest, 0, n_layers, n_logits, backward=True).bytes(lm)


def _info(
    deltas: Mapping[str, LowRank | Dense], nlls: Sequence[float], n_tokens: int, kind: str | list[str]
) -> dict[str, object]:
    return {
        "update_norm": Edit(deltas).norm(),
        "losses": [[sum(nlls) / len(nlls)]],
        "target_probability": sum(math.exp(-nll) for nll in nlls) / len(nlls),
        "n_tokens": n_tokens,
        "subject_kind": kind,
    }


def _plus(a: LowRank | Dense, b: LowRank) -> LowRank | Dense:
    """a + b, low-rank as long as that takes fewer numbers than the matrix."""
    d_out, d_in = b.shape
    if isinstance(a, LowRank) and (a.left.shape[1] + b.left.shape[1]) * (d_out + d_in) <= d_out * d_in:
        return LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right]))
    return Dense(a.dense() + b.dense())
