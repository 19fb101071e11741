"""ROME and its consistent relatives: one fact becomes one rank-one update of one MLP projection.

    ΔW = (v* - W k) uᵀ / (k·u),   u = C⁻¹ k' / ‖C⁻¹ k'‖        so that (W + ΔW) k = v*

The keys are inputs of the projection W at the subject's last token: k_u behind no prefix, k̄ the mean over all context
templates (the empty one is among them, as published, unless others are given). Which of them stand for k and k' is
`key_mode`:

| key_mode   | k' (direction) | k (divisor)| known as                                                        |
|------------|----------------|------------|-----------------------------------------------------------------|
| "mixed"    | k̄              | k_u        | ROME as released: k_u·u may come close to zero                  |
| "prefixed" | k̄              | k̄          | C-ROME, R-ROME: with C, k·u cannot vanish                       |
| "plain"    | k_u            | k_u        | p-ROME                                                          |

The search for v* = v_init + δ adds δ to the value behind every template. What it starts from is `target_init`: the
value at the plain prompt ("unprefixed", as published, in every key mode), or the mean over the templates
("prefixed_mean"), with which C-ROME's residual is δ itself. From its norm follow the bound of δ and the weight decay,
too. Templates without "{}" leave the plain prompt out of k̄, out of that mean and out of the loss; k_u and the
unprefixed v_init are its own all the same, and "{subject} is a" has no prefix ever.

Without a second moment C is the identity, as in the released settings of the collapse papers. A ridge is no part of the
published method: it makes C⁻¹ k' hang less on the text that C is of, where C has directions that next to no key is in.

Meng et al., Locating and Editing Factual Associations in GPT, eq. 2-4; for the modes, The Fall of ROME (Yang et al.)
and Rebuilding ROME (Gupta et al.).

`Edit.info` holds, as numbers and words: numerator ‖v* - W k‖, denominator |k·u| (u of unit norm), signed_denominator
k·u (negative: what brings k to v* moves keys along u away from it), update_norm ‖ΔW‖_F = numerator/denominator, losses
(one [total, nll, kl, weight decay] a step), target_probability (geometric mean over the target's tokens, mean over
templates, at the last loss), stop_reason ("loss" | "steps" | "first choice" | "nan"), layer, key_mode, second_moment
(whether given), target_init, n_templates, subject_kind; and as CPU tensors: key_plain k_u, key_mean k̄, u, value_init
(what v* starts from), value_star v*, value_now (W k + b).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import KeyPass
from nbkit.keys.solving import SecondMoments
from nbkit.methods.anchoring import anchored
from nbkit.methods.method import MethodSettings, edit_made
from nbkit.methods.values import OptimisedValue, ValueParameters, initial_value, value_job, values_in_batches
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import in_order
from nbkit.records.bounds import bounded
from nbkit.records.requests import EditRequest

KEY_MODES = ("mixed", "prefixed", "plain")
TARGET_INITS = ("unprefixed", "prefixed_mean")


@dataclass(frozen=True)
class RomeParameters(ValueParameters):
    """The hyper-parameters of the search for v*, where it is made, and which keys the update is made of."""

    layer: int = bounded(about="whose MLP projection is edited")
    second_moment_ridge: float = bounded(
        least=0, about="so many times C's mean eigenvalue is added to its diagonal; without C nothing"
    )
    key_mode: str = bounded(choices=KEY_MODES, about="which keys: mixed is ROME, prefixed C-ROME, plain p-ROME")
    target_init: str = bounded(choices=TARGET_INITS, about="what v* starts from: the plain prompt's value, or the mean")

    @property
    def layers(self) -> tuple[int]:
        return (self.layer,)


def rome(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, as `Method.each`."""
    return [made for (made,) in rome_variants(lm, requests, settings, [settings])]


def rome_variants(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    settings: MethodSettings,
    variants: Sequence[MethodSettings],
) -> list[list[Edit]]:
    """Of every request an edit by each of the variants, which share one search for v*, the costly part.

    The search is that of `settings`; a variant may have another key_mode, other second moments and another ridge, of
    which it knows nothing. MethodError for one that differs in anything else.
    """
    for variant in variants:
        free = {name: getattr(settings.parameters, name) for name in ("key_mode", "second_moment_ridge")}
        same = replace(variant.parameters, **free) == settings.parameters
        if not same or list(variant.context_templates) != list(settings.context_templates):
            raise MethodError("variants that share a search for v* differ in key_mode, second moment and ridge alone")
    jobs = [value_job(lm, request, settings.context_templates) for request in requests]
    batches = values_in_batches(lm, jobs, settings, settings.parameters.layer, name=f"{lm.title}: rome")

    def of_batch(places: Sequence[int], states: KeyPass, optimised: Sequence[OptimisedValue]) -> list[list[Edit]]:
        there = [requests[place] for place in places]
        optimised = anchored(lm, there, optimised, settings.parameters)
        by_variant = [_rank_one_edits(lm, there, states, optimised, variant) for variant in variants]
        return [list(of_request) for of_request in zip(*by_variant, strict=True)]

    return in_order((places, of_batch(places, states, optimised)) for places, states, optimised in batches)


def update_direction(
    states: KeyPass, second_moments: SecondMoments, parameters: RomeParameters, n_templates: int
) -> tuple[Float[Tensor, "edit d_mlp"], Float[Tensor, "edit d_model"], Float[Tensor, "edit d_mlp"]]:
    """k, W k + b and u of every edit, the last of unit norm in float64: all of the update but v*.

    states: keys and values, (edit, template, d), the first those of the plain prompt, the last `n_templates` those
    behind the templates given, of which k̄ is the mean.
    """
    layer, key_mode = parameters.layer, parameters.key_mode
    key_plain, key_mean = states.keys[:, 0], states.keys[:, -n_templates:].mean(1)  # k_u, k̄
    # k' gives the direction of the update, k is the key that shall map to v*.
    key_direction = key_plain if key_mode == "plain" else key_mean
    if key_mode == "prefixed":
        key, value_now = key_mean, states.values[:, -n_templates:].mean(1)
    else:
        key, value_now = key_plain, states.values[:, 0]
    if second_moments:
        u = second_moments.solve(layer, key_direction, parameters.second_moment_ridge)
    else:
        u = key_direction.double()
    return key, value_now, u / u.norm(dim=-1, keepdim=True)


def _rank_one_edits(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    states: KeyPass,
    optimised: Sequence[OptimisedValue],
    settings: MethodSettings,
) -> list[Edit]:
    """The closed form, for all requests of a batch: shapes are (edit, d) throughout."""
    parameters, n_templates = settings.parameters, len(settings.context_templates)
    layer, key_mode = parameters.layer, parameters.key_mode
    key, value_now, u = update_direction(states, settings.second_moments, parameters, n_templates)
    value_init = initial_value(states.values, parameters, n_templates)
    value_star = torch.stack([value.value_star for value in optimised])

    residual = (value_star - value_now).double()  # v* - W k; the bias is in both and cancels
    divisor = (key.double() * u).sum(-1)
    left, right = (residual / divisor[:, None]).to(key.dtype), u.to(key.dtype)
    tensors = {"key_plain": states.keys[:, 0], "key_mean": states.keys[:, -n_templates:].mean(1), "u": right,
               "value_init": value_init, "value_star": value_star, "value_now": value_now}  # fmt: skip
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    numerators, denominators = residual.norm(dim=-1), divisor.abs()
    names = ("numerator", "denominator", "signed_denominator", "update_norm")
    numbers = torch.stack([numerators, denominators, divisor, numerators / denominators], 1).tolist()
    edits = []
    for place, (request, value) in enumerate(zip(requests, optimised, strict=True)):
        info = {
            **dict(zip(names, numbers[place], strict=True)),
            "losses": value.losses,
            "target_probability": value.target_probability,
            "stop_reason": value.stop_reason,
            "layer": layer,
            "key_mode": key_mode,
            "second_moment": bool(settings.second_moments),
            "target_init": parameters.target_init,
            "n_templates": n_templates,
        }
        delta = LowRank(left=left[place, :, None].clone(), right=right[place, None, :].clone())
        of_place = {name: tensor[place].clone() for name, tensor in on_cpu.items()}
        edits.append(edit_made(lm, [request], settings, {lm.weight_name(layer): delta}, info, of_place))
    return edits
