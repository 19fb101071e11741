"""MEMIT and its relatives EMMET, AlphaEdit and ENCORE: many facts become one update of several layers, by one form.

    z   = z₀ + δ, the residual stream behind the last of `layers`, at the subject's last token, that makes the model say
          the target (the search of values.py), for each request
    for each of the L layers ℓ, from below, in the model that carries the layers before:
        K   = keys of all requests, (d_mlp, n);  R = (z - what the stream behind the last layer now is) / layers to go
        ΔW  = R (K̃ᵀ B⁻¹ K̃ + ridge I)⁻¹ K̃ᵀ B⁻¹,   B = second_moment_weight C + norm_weight I + K̃_p K̃_pᵀ

What differs is only what the letters stand for, so it is all hyper-parameters:

| method    | K̃ (and K̃_p)                    | B                              | ridge                    |
|-----------|--------------------------------|--------------------------------|--------------------------|
| memit     | K                              | λ C (+ K_p K_pᵀ)               | 1                        |
| emmet     | K                              | λ C                            | 0.1, of one request none |
| alphaedit | P K: C's small eigenvectors' P | norm_weight I + K̃_p K̃_pᵀ       | 1                        |
| encore    | K                              | λ C + norm_weight I + K_p K_pᵀ | 1                        |

With ridge 1 the form is R Kᵀ (B + K Kᵀ)⁻¹, by the push-through identity, which is how MEMIT writes it; with ridge 0 it
is EMMET's equality constraint W k = v exactly, where λ cancels out. EMMET's released code adds its ridge for several
requests only, hence `ridge_of_one`. AlphaEdit's [P(KKᵀ + K_pK_pᵀ) + L₂ I]⁻¹ P K has all its columns in the
range of P, where it is the same form with B = L₂ I + K̃_pK̃_pᵀ. K_p are the keys of earlier edits of the sequence
(`key_cache`): without them each step forgets what the ones before promised.

A key is the mean of the unprefixed one and of the mean over the other context templates; what the stream now is, is
taken without a prefix. That mixes keys as ROME does, but B + K Kᵀ cannot vanish. Where a norm follows the projection
(Gemma's), the stream does not get the residual as it is, and edits are rougher than elsewhere.

Meng et al., Mass-Editing Memory in a Transformer, eq. 14 and algorithm 1; Gupta et al., A Unified Framework for Model
Editing (EMMET); Fang et al., AlphaEdit; Gupta et al., Lifelong Knowledge Editing Requires Better Regularization
(ENCORE). They differ in nothing else here, in particular not in how z is found, but that ENCORE's search stops after
some losses at which the target is the first choice on all prompts (values.py).

`Edit.info` holds update_norm ‖ΔW‖_F over all layers, residual_norm (mean over requests of ‖z - z₀‖), target_probability
(mean over requests, at the search's last loss), stop_reason and losses of the search (of an edit of several requests:
their number by reason and the mean of their last losses), subject_kind of a single request; as CPU tensors z
(n, d_model) and keys_<layer> (n, d_mlp).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import restoring
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import keys, widened
from nbkit.keys.solving import SecondMoments, factor
from nbkit.methods.anchoring import anchored
from nbkit.methods.method import MethodSettings, edit_made
from nbkit.methods.values import OptimisedValue, ValueParameters, value_job, values_in_batches
from nbkit.models.hooks import capture
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import in_order
from nbkit.models.prompts import find_subjects, pad
from nbkit.records.bars import steps
from nbkit.records.bounds import bounded
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class MemitParameters(ValueParameters):
    """The hyper-parameters of the search for z, and of the closed form in the module's docstring."""

    layers: tuple[int, ...] = bounded(about="that share the update; v* is searched for at the last")
    second_moment_weight: float = bounded(least=0, about="λ, the weight of C")
    norm_weight: float = bounded(least=0, about="the weight of ‖ΔW‖²")
    ridge: float = bounded(least=0, about="added to the diagonal of what is solved with for a batch")
    ridge_of_one: bool = bounded(about="whether an edit of a single request has the ridge too")
    nullspace_threshold: float = bounded(
        least=0, about="only along C's eigenvectors with an eigenvalue below; 0: along all"
    )
    key_cache: bool = bounded(about="whether the keys of earlier edits of a sequence are spared")

    site = "block"

    def __post_init__(self):
        super().__post_init__()
        if not self.second_moment_weight + self.norm_weight > 0:
            raise MethodError("second_moment_weight and norm_weight are both 0: nothing bounds the update")


def memit_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, as `Method.each`: the targets z are searched side by side."""
    targets = _targets(lm, requests, settings)
    each, name = list(zip(requests, targets, strict=True)), f"{lm.title}: {settings.method}, updates"
    return [_edit_of_layers(lm, [one], [z], settings) for one, z in steps(each, name, "edit", settings.progress)]


def memit_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit that carries all requests."""
    return _edit_of_layers(lm, requests, _targets(lm, requests, settings), settings)


def _targets(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[OptimisedValue]:
    """Where the stream behind the last layer shall be for each request: z is the value_star of each."""
    jobs = [value_job(lm, request, settings.context_templates) for request in requests]
    last, name = max(settings.parameters.layers), f"{lm.title}: {settings.method}, targets"
    batches = values_in_batches(lm, jobs, settings, last, settings.parameters.site, name)
    found = in_order((places, optimised) for places, _, optimised in batches)
    return anchored(lm, requests, found, settings.parameters)


def _edit_of_layers(
    lm: LanguageModel, requests: Sequence[EditRequest], targets: Sequence[OptimisedValue], settings: MethodSettings
) -> Edit:
    """The closed form, layer by layer, each in the model that carries those before."""
    parameters: MemitParameters = settings.parameters
    layers = sorted(parameters.layers)
    z = torch.stack([target.value_star for target in targets])  # (request, d_model)
    dtype = torch.promote_types(lm.dtype, torch.float32)
    deltas, tensors, residual_norm = {}, {"z": z.cpu()}, 0.0
    with restoring(lm) as add:
        for place, layer in enumerate(layers):
            key = mean_keys(lm, requests, layer, settings.context_templates)
            residual = (z - states_behind(lm, requests, layers[-1])).double()
            residual_norm = residual_norm or residual.norm(dim=-1).mean().item()
            earlier = [edit[f"keys_{layer}"] for edit in settings.earlier] if parameters.key_cache else []
            right = right_factor(key, earlier, settings.second_moments, layer, parameters)
            delta = LowRank(residual.T / (len(layers) - place), right).compact().to(dtype)
            tensors[f"keys_{layer}"] = key.cpu()
            deltas[lm.weight_name(layer)] = delta
            add(Edit({lm.weight_name(layer): delta}))
    info = {
        "update_norm": Edit(deltas).norm(),
        "residual_norm": residual_norm,
        "target_probability": sum(target.target_probability for target in targets) / len(targets),
        "layers": ", ".join(map(str, layers)),
        "n_templates": len(settings.context_templates),
        **_search_info(targets),
    }
    return edit_made(lm, requests, settings, deltas, info, tensors)


def keys_to_spare(edit: Edit, parameters: MemitParameters) -> dict[str, Tensor]:
    """What a sequence remembers of an edit, as `Method.remembers`: its keys, if those are spared."""
    layers = parameters.layers if parameters.key_cache else ()
    return {f"keys_{layer}": edit.info[f"keys_{layer}"] for layer in layers}


def _search_info(targets: Sequence[OptimisedValue]) -> dict[str, object]:
    if len(targets) == 1:
        return {"stop_reason": targets[0].stop_reason, "losses": targets[0].losses}
    reasons = Counter(target.stop_reason for target in targets)
    last = torch.tensor([target.losses[-1] for target in targets], dtype=torch.float64).mean(0).tolist()
    return {"stop_reason": ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()), "losses": [last]}


def mean_keys(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, context_templates: Sequence[str]
) -> Float[Tensor, "request d_mlp"]:
    """Keys of the model as it is: the mean of the unprefixed one, and of the mean over the other templates' if any."""
    by_template = keys(lm, requests, layer, context_templates).double()
    plain = by_template[:, 0]
    return plain if by_template.shape[1] == 1 else (plain + by_template[:, 1:].mean(1)) / 2


@torch.no_grad()
def states_behind(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, batch_size: int = 256
) -> Float[Tensor, "request d_model"]:
    """The residual stream behind a layer, at the subject's last token of each request's own prompt."""
    rows, indices = find_subjects(lm, [r.prompt for r in requests], [r.subject for r in requests])
    rows = [row[: index + 1] for row, index in zip(rows, indices, strict=True)]  # what follows does not reach it
    states = []
    for start in range(0, len(rows), batch_size):
        batch = pad(lm, rows[start : start + batch_size])
        with capture(lm.block(layer), stop=True) as output:
            lm.logits(batch, keep=1)
        at = torch.arange(batch.shape[0], device=lm.device), batch.columns(indices[start : start + batch_size])
        states.append(output.value[at])
    return widened(torch.cat(states))


def right_factor(
    key: Float[Tensor, "n d_mlp"],
    earlier: Sequence[Float[Tensor, "m d_mlp"]],
    second_moments: SecondMoments,
    layer: int,
    parameters: MemitParameters,
) -> Float[Tensor, "n d_mlp"]:
    """(K̃ᵀ B⁻¹ K̃ + ridge I)⁻¹ K̃ᵀ B⁻¹ in float64, see the module's docstring. key: Kᵀ; earlier: K_pᵀ of each edit.

    MethodError for equal keys with ridge 0, which ask for two values of one. NaN where a broken model gives keys that
    are not finite, are zero, or are too large for B to be solved with in float64.
    """
    moment_weight, norm_weight = parameters.second_moment_weight, parameters.norm_weight
    key = key.double()
    earlier, unsolvable = [part.to(key) for part in earlier], torch.full_like(key, torch.nan)
    if not all(part.isfinite().all() for part in (key, *earlier)):
        return unsolvable
    if parameters.nullspace_threshold:
        basis = second_moments.small_directions(layer, parameters.nullspace_threshold)  # (d_mlp, m)
        key, earlier = key @ basis @ basis.T, [part @ basis @ basis.T for part in earlier]
    if not earlier and not norm_weight:  # C is factored once for many edits
        solved = second_moments.solve(layer, key) / moment_weight
    elif not earlier and not moment_weight:
        solved = key / norm_weight
    else:
        bound = _bound_without_keys(second_moments, layer, parameters, key)
        for part in earlier:
            bound.addmm_(part.T, part)
        lower, failed = torch.linalg.cholesky_ex(bound)
        if failed.item():
            factor(_bound_without_keys(second_moments, layer, parameters, key))  # tells if C is to blame, not the keys
            return unsolvable
        solved = torch.cholesky_solve(key.T, lower).T
    gram = solved @ key.T
    ridge = parameters.ridge if parameters.ridge_of_one or len(key) > 1 else 0.0
    gram = (gram + gram.T) / 2 + ridge * torch.eye(len(key), dtype=key.dtype, device=key.device)
    lower, failed = torch.linalg.cholesky_ex(gram)
    pivots = lower.diagonal()
    if not failed.item() and pivots.min() > 1e-6 * pivots.max():  # in float64 equal keys leave some 1e-8
        return torch.cholesky_solve(solved, lower)
    if len(key) > 1 and not ridge:
        raise MethodError("the keys of the requests are not independent, so ridge must be above 0")
    return unsolvable


def _bound_without_keys(
    second_moments: SecondMoments, layer: int, parameters: MemitParameters, like: Float[Tensor, "n d_mlp"]
) -> Float[Tensor, "d_mlp d_mlp"]:
    """B of no earlier edits, in the precision and on the device of `like`."""
    bound = parameters.norm_weight * torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    if parameters.second_moment_weight:
        bound += parameters.second_moment_weight * second_moments.matrix(layer).double()
    return bound
