"""MEMIT and its relatives EMMET and AlphaEdit: many facts become one update of several layers, by one closed form.

    z   = z₀ + δ, the residual stream behind the last of `layers`, at the subject's last token, that makes the model say
          the target (the search of values.py), for each request
    for each of the L layers ℓ, from below, in the model that carries the layers before:
        K   = keys of all requests, (d_mlp, n);  R = (z - what the stream behind the last layer now is) / layers to go
        ΔW  = R (K̃ᵀ B⁻¹ K̃ + ridge I)⁻¹ K̃ᵀ B⁻¹,   B = second_moment_weight C + norm_weight I + K̃_p K̃_pᵀ

What differs is only what the letters stand for, so it is all hyper-parameters:

| method    | K̃ (and K̃_p)                    | B                          | ridge |
|-----------|--------------------------------|----------------------------|-------|
| memit     | K                              | λ C (+ K_p K_pᵀ)           | 1     |
| emmet     | K                              | λ C                        | 0.1   |
| alphaedit | P K: C's small eigenvectors' P | norm_weight I + K̃_p K̃_pᵀ   | 1     |

With ridge 1 the form is R Kᵀ (B + K Kᵀ)⁻¹, by the push-through identity, which is how MEMIT writes it; ridge 0 would
be EMMET's equality constraint W k = v exactly. AlphaEdit's [P(KKᵀ + K_pK_pᵀ) + L₂ I]⁻¹ P K has all its columns in the
range of P, where it is the same form with B = L₂ I + K̃_pK̃_pᵀ. K_p are the keys of earlier edits of the sequence
(`key_cache`): without them each step forgets what the ones before promised.

A key is the mean of the unprefixed one and of the mean over the other context templates; what the stream now is, is
taken without a prefix. That mixes keys as ROME does, but B + K Kᵀ cannot vanish. Where a norm follows the projection
(Gemma's), the stream does not get the residual as it is, and edits are rougher than elsewhere.

Meng et al., Mass-Editing Memory in a Transformer, eq. 14 and algorithm 1; Gupta et al., A Unified Framework for Model
Editing (EMMET); Fang et al., AlphaEdit. The three differ in nothing else here, in particular not in how z is found.

`Edit.info` holds update_norm ‖ΔW‖_F over all layers, residual_norm (mean over requests of ‖z - z₀‖), target_probability
(mean over requests, at the search's last loss), stop_reason, subject_kind and losses of the search (of an edit of
several requests: their number by reason, "" and the mean of their last losses); as CPU tensors z (n, d_model) and
keys_<layer> (n, d_mlp).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import restoring
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import keys, widened
from nbkit.keys.moments import SecondMoments, factor
from nbkit.methods.method import Setting
from nbkit.methods.values import OptimisedValue, ValueParameters, value_job, values_in_batches
from nbkit.models.hooks import capture
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import find_subjects, pad, subject_kind
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class MemitParameters(ValueParameters):
    """The hyper-parameters of the search for z, and of the closed form in the module's docstring."""

    layers: tuple[int, ...]
    second_moment_weight: float  # λ
    norm_weight: float
    ridge: float
    nullspace_threshold: float  # P is of C's eigenvectors whose eigenvalue is below; 0: no P
    key_cache: bool  # whether B holds the keys of earlier edits of the sequence

    def __post_init__(self):
        super().__post_init__()
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise MethodError(f"layers must be one or more different layers, not {list(self.layers)}")
        for name in ("second_moment_weight", "norm_weight", "ridge", "nullspace_threshold"):
            if not getattr(self, name) >= 0:
                raise MethodError(f"{name} must be 0 or above, not {getattr(self, name)}")
        if not self.second_moment_weight + self.norm_weight > 0:
            raise MethodError("second_moment_weight and norm_weight are both 0: nothing bounds the update")


def memit_each(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[Edit]:
    """One edit a request, each of the model as it is. The targets z are searched side by side."""
    targets = _targets(lm, requests, setting)
    bar = tqdm(requests, desc=f"{setting.method}, updates", unit="edit", disable=not setting.progress)
    return [_edit(lm, [request], [targets[place]], setting) for place, request in enumerate(bar)]


def memit_together(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> Edit:
    """One edit that carries all requests. The model is unchanged afterwards."""
    return _edit(lm, requests, _targets(lm, requests, setting), setting)


@dataclass(frozen=True)
class _Target:
    """Where the stream behind the last layer shall be, and how that was found."""

    z: Float[Tensor, " d_model"]
    found: OptimisedValue


def _targets(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[_Target]:
    last = max(setting.parameters.layers)
    jobs = [value_job(lm, request, setting.context_templates) for request in requests]
    targets: dict[int, _Target] = {}
    for places, states, optimised in values_in_batches(lm, jobs, setting, last, "block", f"{setting.method}, targets"):
        for place, state, value in zip(places, states.values[:, 0], optimised, strict=True):
            targets[place] = _Target(state + value.delta, value)
    return [targets[place] for place in range(len(jobs))]


def _edit(lm: LanguageModel, requests: Sequence[EditRequest], targets: Sequence[_Target], setting: Setting) -> Edit:
    """The closed form, layer by layer, each in the model that carries those before."""
    p: MemitParameters = setting.parameters
    layers = sorted(p.layers)
    z = torch.stack([target.z for target in targets])  # (request, d_model)
    deltas, tensors, residual_norm = {}, {"z": z.cpu()}, 0.0
    with restoring(lm) as add:
        for place, layer in enumerate(layers):
            found = mean_keys(lm, requests, layer, setting.context_templates)
            residual = (z - states_behind(lm, requests, layers[-1])).double()
            residual_norm = residual_norm or residual.norm(dim=-1).mean().item()
            earlier = _earlier_keys(setting.earlier, layer) if p.key_cache else []
            right = right_factor(found, earlier, setting.second_moments, layer, p)
            delta = _update(residual.T / (len(layers) - place), right, lm.dtype)
            tensors[f"keys_{layer}"] = found.cpu()
            deltas[lm.weight_name(layer)] = delta
            add(Edit({lm.weight_name(layer): delta}))
    optimised = [target.found for target in targets]
    info = {
        "update_norm": Edit(deltas).norm(),
        "residual_norm": residual_norm,
        "target_probability": sum(value.target_probability for value in optimised) / len(optimised),
        "layers": ", ".join(map(str, layers)),
        "n_templates": len(setting.context_templates),
        **_search_info(lm, requests, optimised),
        **tensors,
    }
    return Edit(deltas, tuple(requests), setting.method, asdict(p), info)


def _search_info(
    lm: LanguageModel, requests: Sequence[EditRequest], optimised: Sequence[OptimisedValue]
) -> dict[str, object]:
    if len(requests) == 1:
        (value,) = optimised
        kind = subject_kind(lm, requests[0])
        return {"stop_reason": value.stop_reason, "losses": value.losses, "subject_kind": kind}
    reasons = Counter(value.stop_reason for value in optimised)
    last = torch.tensor([value.losses[-1] for value in optimised], dtype=torch.float64).mean(0).tolist()
    return {"stop_reason": ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()), "losses": [last]}


def mean_keys(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, context_templates: Sequence[str]
) -> Float[Tensor, "request d_mlp"]:
    """Keys of the model as it is: the mean of the unprefixed one, and of the mean over the other templates' if any."""
    found = keys(lm, requests, layer, context_templates).double()
    plain = found[:, 0]
    return plain if found.shape[1] == 1 else (plain + found[:, 1:].mean(1)) / 2


@torch.no_grad()
def states_behind(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, batch_size: int = 256
) -> Float[Tensor, "request d_model"]:
    """The residual stream behind a layer, at the subject's last token of each request's own prompt."""
    rows, indices = find_subjects(lm, [r.prompt for r in requests], [r.subject for r in requests])
    rows = [row[: index + 1] for row, index in zip(rows, indices, strict=True)]  # what follows does not reach it
    found = []
    for start in range(0, len(rows), batch_size):
        batch = pad(lm, rows[start : start + batch_size])
        with capture(lm.block(layer), stop=True) as output:
            lm.logits(batch, keep=1)
        at = torch.arange(batch.shape[0], device=lm.device), batch.columns(indices[start : start + batch_size])
        found.append(output.value[at])
    return widened(torch.cat(found))


def right_factor(
    found: Float[Tensor, "n d_mlp"],
    earlier: Sequence[Float[Tensor, "m d_mlp"]],
    second_moments: SecondMoments,
    layer: int,
    p: MemitParameters,
) -> Float[Tensor, "n d_mlp"]:
    """(K̃ᵀ B⁻¹ K̃ + ridge I)⁻¹ K̃ᵀ B⁻¹ in float64, see the module's docstring. found: Kᵀ; earlier: K_pᵀ of each edit.

    MethodError if that cannot be solved: with ridge 0, two equal keys.
    """
    found = found.double()
    earlier = [part.to(found) for part in earlier]
    if p.nullspace_threshold:
        basis = second_moments.small_directions(layer, p.nullspace_threshold)  # (d_mlp, m)
        found, earlier = found @ basis @ basis.T, [part @ basis @ basis.T for part in earlier]
    if not earlier and not p.norm_weight:  # C is factored once for many edits
        solved = second_moments.solve(layer, found) / p.second_moment_weight
    elif not earlier and not p.second_moment_weight:
        solved = found / p.norm_weight
    else:
        bound = p.norm_weight * torch.eye(found.shape[1], dtype=found.dtype, device=found.device)
        if p.second_moment_weight:
            bound += p.second_moment_weight * second_moments.matrix(layer).double()
        for part in earlier:
            bound.addmm_(part.T, part)
        solved = torch.cholesky_solve(found.T, factor(bound)).T
    gram = solved @ found.T
    gram = (gram + gram.T) / 2 + p.ridge * torch.eye(len(found), dtype=found.dtype, device=found.device)
    lower, info = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal()
    if info.item() or pivots.min() <= 1e-6 * pivots.max():  # in float64 equal keys leave some 1e-8
        raise MethodError("the keys of the requests are not independent, so ridge must be above 0")
    return torch.cholesky_solve(solved, lower)


def _earlier_keys(earlier: Sequence[Edit], layer: int) -> list[Tensor]:
    return [edit.info[f"keys_{layer}"] for edit in earlier]


def _update(
    left: Float[Tensor, "d_model n"], right: Float[Tensor, "n d_mlp"], dtype: torch.dtype
) -> LowRank | Dense:
    """As factors where they are smaller than their product."""
    dtype = torch.promote_types(dtype, torch.float32)
    if left.numel() + right.numel() < left.shape[0] * right.shape[1]:
        return LowRank(left.to(dtype), right.to(dtype))
    return Dense((left @ right).to(dtype))

