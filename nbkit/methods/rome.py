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
from tqdm.auto import tqdm

from nbkit.edits import Edit, LowRank
from nbkit.errors import MethodError
from nbkit.keys import in_contexts, keys_and_values, widened
from nbkit.models import LanguageModel
from nbkit.moments import SecondMoments
from nbkit.prompts import find_subjects, named, subject_kind, target_ids
from nbkit.replay import Replay
from nbkit.requests import EditRequest

KEY_MODES = ("mixed", "prefixed", "plain")
KL_PROMPT = "{} is a"  # what follows the subject's last token in it shall not move: the subject stays what it is


@dataclass(frozen=True)
class RomeParameters:
    """Hyper-parameters; their defaults by model are in hparams.toml."""

    layer: int
    key_mode: str
    v_lr: float  # of Adam, on v*
    v_num_grad_steps: int  # losses computed at most; the last one makes no step
    v_weight_decay: float  # times ‖δ‖ / ‖value_init‖²
    clamp_norm_factor: float  # ‖δ‖ is kept below so many times ‖value_init‖
    kl_factor: float
    early_stop_loss: float  # stop once the total loss is below

    def __post_init__(self):
        if self.key_mode not in KEY_MODES:
            raise MethodError(f"key_mode {self.key_mode!r} is unknown; it is one of {', '.join(KEY_MODES)}")
        for name in ("v_lr", "v_num_grad_steps", "clamp_norm_factor"):
            if not getattr(self, name) > 0:
                raise MethodError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("v_weight_decay", "kl_factor"):
            if not getattr(self, name) >= 0:
                raise MethodError(f"{name} must be 0 or above, not {getattr(self, name)}")


@dataclass(frozen=True)
class OptimisedValue:
    """v* = value_init + delta, and how it was found."""

    delta: Float[Tensor, " d_model"]
    losses: list[list[float]]  # per step [total, nll, kl, weight decay]
    target_probability: float
    stop_reason: str


def rome(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    context_templates: Sequence[str],
    second_moments: SecondMoments,
    parameters: RomeParameters,
    progress: bool = False,
) -> list[Edit]:
    """One edit a request, each of the model as it is. The model is unchanged afterwards."""
    bar = tqdm(requests, desc="rome", unit="edit", disable=not progress)
    edits = []
    for request in bar:
        with named(request):
            edits.append(_edit(lm, request, context_templates, second_moments, parameters))
    return edits


def _edit(
    lm: LanguageModel,
    request: EditRequest,
    context_templates: Sequence[str],
    second_moments: SecondMoments,
    parameters: RomeParameters,
) -> Edit:
    layer = parameters.layer
    prompts = in_contexts(request, context_templates)
    found = keys_and_values(lm, prompts, [request.subject] * len(prompts), layer)
    key_plain, key_mean = found.keys[0], found.keys.mean(0)  # k_u, k̄
    value_init = found.values[0]  # the unprefixed value, in every key mode

    # k' gives the direction of the update, k is the key that shall map to v*.
    key_direction = key_plain if parameters.key_mode == "plain" else key_mean
    if parameters.key_mode == "prefixed":
        key, value_now = key_mean, found.values.mean(0)
    else:
        key, value_now = key_plain, found.values[0]

    u = (second_moments.solve(layer, key_direction) if second_moments else key_direction).double()
    u = u / u.norm()
    optimised = optimise_value(lm, request, prompts, value_init, parameters)
    value_star = value_init + optimised.delta

    residual = (value_star - value_now).double()  # v* - W k; the bias is in both and cancels
    divisor = key.double() @ u
    delta = LowRank(left=(residual / divisor).to(key.dtype)[:, None], right=u.to(key.dtype)[None, :])
    info = {
        "numerator": residual.norm().item(),
        "denominator": divisor.abs().item(),
        "update_norm": (residual.norm() / divisor.abs()).item(),
        "losses": optimised.losses,
        "target_probability": optimised.target_probability,
        "stop_reason": optimised.stop_reason,
        "layer": layer,
        "key_mode": parameters.key_mode,
        "second_moment": bool(second_moments),
        "n_templates": len(prompts),
        "subject_kind": subject_kind(lm, request),
        "key_plain": key_plain.cpu(),
        "key_mean": key_mean.cpu(),
        "u": u.to(key.dtype).cpu(),
        "value_init": value_init.cpu(),
        "value_star": value_star.cpu(),
        "value_now": value_now.cpu(),
    }
    return Edit({lm.weight_name(layer): delta}, (request,), "rome", asdict(parameters), info)


def optimise_value(
    lm: LanguageModel,
    request: EditRequest,
    prompts: Sequence[str],
    value_init: Float[Tensor, " d_model"],
    parameters: RomeParameters,
) -> OptimisedValue:
    """Find δ, added to the value at the subject's last token, that makes the model say the target after every prompt.

    loss = mean over prompts of the target's negative log-likelihood (mean over its tokens)
         + kl_factor · KL(p ‖ p₀) of the token after the subject in "{subject} is a", p₀ that of δ = 0
         + v_weight_decay · ‖δ‖ / ‖value_init‖²

    The KL term is as in the published code, and so in its numbers: at the subject's last token, where δ is added, not
    at the prompt's end, and of p from p₀, not of p₀ from p.
    A loss that is not finite ends it; the edit is then made with the δ reached, and says so ("nan").
    """
    target = target_ids(lm, request.target_new)
    rows, indices = find_subjects(lm, [*prompts, KL_PROMPT], [request.subject] * (len(prompts) + 1))
    wanted = [range(len(row) - 1, len(row) - 1 + len(target)) for row in rows[:-1]] + [[indices[-1]]]
    rows = [[*row, *target[:-1]] for row in rows[:-1]] + [rows[-1]]
    replay = Replay(lm, parameters.layer, rows, indices, wanted)

    target = torch.tensor(target, device=lm.device)
    largest_norm = parameters.clamp_norm_factor * value_init.norm()
    delta = torch.zeros_like(value_init, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=parameters.v_lr)
    losses, stop_reason = [], "steps"
    for step in range(parameters.v_num_grad_steps):
        log_probabilities = widened(replay.logits(delta)).log_softmax(-1)  # (wanted, vocabulary), the KL row last
        of_targets = log_probabilities[:-1].unflatten(0, (len(prompts), -1))  # (prompt, target token, vocabulary)
        nlls = -of_targets.gather(-1, target.expand(len(prompts), -1)[..., None])[..., 0].mean(-1)  # (prompt,)
        essence = log_probabilities[-1]
        if step == 0:
            essence_before = essence.detach()

        nll = nlls.mean()
        kl = parameters.kl_factor * (essence.exp() * (essence - essence_before)).sum()
        weight_decay = parameters.v_weight_decay * delta.norm() / value_init.norm() ** 2
        loss = nll + kl + weight_decay

        losses.append(torch.stack([loss, nll, kl, weight_decay]).tolist())
        if not loss.isfinite():
            stop_reason = "nan"
            break
        if losses[-1][0] < parameters.early_stop_loss:
            stop_reason = "loss"
            break
        if step == parameters.v_num_grad_steps - 1:
            break

        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            if delta.norm() > largest_norm:
                delta *= largest_norm / delta.norm()
    return OptimisedValue(delta.detach(), losses, (-nlls.detach()).exp().mean().item(), stop_reason)
