"""ROME and its consistent relatives: one fact becomes one rank-one update of one MLP projection.

    ΔW = (v* - W k) uᵀ / (k·u),   u = C⁻¹ k' / ‖C⁻¹ k'‖        so that (W + ΔW) k = v*

The keys are inputs of the projection W at the subject's last token: k_u behind no prefix, k̄ the mean over all context
templates (the empty one is among them). Which of them stand for k and k' is `key_mode`:

| key_mode   | k' (direction) | k (divisor)| known as                                                        |
|------------|----------------|------------|-----------------------------------------------------------------|
| "mixed"    | k̄              | k_u        | ROME as released: k_u·u may come close to zero                  |
| "prefixed" | k̄              | k̄          | C-ROME, R-ROME: with C, k·u cannot vanish                       |
| "plain"    | k_u            | k_u        | p-ROME                                                          |

Without a second moment C is the identity, as in the released settings of the collapse papers.

Meng et al., Locating and Editing Factual Associations in GPT, eq. 2-4; for the modes, The Fall of ROME (Yang et al.)
and Rebuilding ROME (Gupta et al.).

`Edit.info` holds, as numbers and words: numerator ‖v* - W k‖, denominator |k·u| (u of unit norm), update_norm ‖ΔW‖_F
= numerator/denominator, losses (one [total, nll, kl, weight decay] a step), target_probability (geometric mean over the
target's tokens, mean over templates, at the last loss), stop_reason ("loss" | "steps" | "nan"), layer, key_mode,
second_moment (whether given), n_templates, subject_kind; and as CPU tensors: key_plain k_u, key_mean k̄, u,
value_init (the unprefixed value that v* starts from), value_star v*, value_now (W k + b).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import KeyPass
from nbkit.keys.moments import SecondMoments
from nbkit.methods.method import Setting
from nbkit.methods.values import OptimisedValue, ValueJob, ValueParameters, value_job, values_in_batches
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.requests import EditRequest

KEY_MODES = ("mixed", "prefixed", "plain")


@dataclass(frozen=True)
class RomeParameters(ValueParameters):
    """The hyper-parameters of the search for v*, where it is made, and which keys the update is made of."""

    layer: int
    key_mode: str

    def __post_init__(self):
        super().__post_init__()
        if self.key_mode not in KEY_MODES:
            raise MethodError(f"key_mode {self.key_mode!r} is unknown; it is one of {', '.join(KEY_MODES)}")


def rome(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[Edit]:
    """One edit a request, each of the model as it is. The model is unchanged afterwards.

    Edits are computed side by side, `batch_size` at once or as many as memory takes; they do not see each other.
    """
    parameters: RomeParameters = setting.parameters
    jobs = [value_job(lm, request, setting.context_templates) for request in requests]
    edits: dict[int, Edit] = {}
    for places, found, optimised in values_in_batches(lm, jobs, setting, parameters.layer, name="rome"):
        chosen = [jobs[place] for place in places]
        made = _edits(lm, chosen, found, optimised, setting.second_moments, parameters)
        edits |= dict(zip(places, made, strict=True))
    return [edits[place] for place in range(len(jobs))]


def update_direction(
    found: KeyPass, second_moments: SecondMoments, layer: int, key_mode: str
) -> tuple[Float[Tensor, "edit d_mlp"], Float[Tensor, "edit d_model"], Float[Tensor, "edit d_mlp"]]:
    """k, W k + b and u of every edit, the last of unit norm in float64: all of the update but v*.

    found: keys and values, (edit, template, d), the first template being the empty one.
    """
    key_plain, key_mean = found.keys[:, 0], found.keys.mean(1)  # k_u, k̄
    # k' gives the direction of the update, k is the key that shall map to v*.
    key_direction = key_plain if key_mode == "plain" else key_mean
    if key_mode == "prefixed":
        key, value_now = key_mean, found.values.mean(1)
    else:
        key, value_now = key_plain, found.values[:, 0]
    u = (second_moments.solve(layer, key_direction) if second_moments else key_direction).double()
    return key, value_now, u / u.norm(dim=-1, keepdim=True)


def _edits(
    lm: LanguageModel,
    jobs: Sequence[ValueJob],
    found: KeyPass,
    optimised: Sequence[OptimisedValue],
    second_moments: SecondMoments,
    parameters: RomeParameters,
) -> list[Edit]:
    """The closed form, for all jobs of a batch: shapes are (edit, d) throughout."""
    key, value_now, u = update_direction(found, second_moments, parameters.layer, parameters.key_mode)
    value_init = found.values[:, 0]  # the unprefixed value, in every key mode
    value_star = value_init + torch.stack([value.delta for value in optimised])

    residual = (value_star - value_now).double()  # v* - W k; the bias is in both and cancels
    divisor = (key.double() * u).sum(-1)
    left = (residual / divisor[:, None]).to(key.dtype)
    numerators, denominators = residual.norm(dim=-1), divisor.abs()
    tensors = {"key_plain": found.keys[:, 0], "key_mean": found.keys.mean(1), "u": u.to(key.dtype),
               "value_init": value_init, "value_star": value_star, "value_now": value_now}  # fmt: skip
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    numbers = torch.stack([numerators, denominators, numerators / denominators], 1).tolist()
    edits = []
    for place, (job, value) in enumerate(zip(jobs, optimised, strict=True)):
        info = dict(zip(("numerator", "denominator", "update_norm"), numbers[place], strict=True))
        info |= {
            "losses": value.losses,
            "target_probability": value.target_probability,
            "stop_reason": value.stop_reason,
            "layer": parameters.layer,
            "key_mode": parameters.key_mode,
            "second_moment": bool(second_moments),
            "n_templates": len(job.rows) - 1,
            "subject_kind": subject_kind(lm, job.request),
        }
        info |= {name: tensor[place].clone() for name, tensor in on_cpu.items()}
        delta = LowRank(left=left[place, :, None].clone(), right=u[place, None, :].to(key.dtype))
        deltas = {lm.weight_name(parameters.layer): delta}
        edits.append(Edit(deltas, (job.request,), "rome", asdict(parameters), info))
    return edits
