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
from nbkit.keys import KeyPass, in_contexts, widened
from nbkit.memory import Footprint, budget, in_batches
from nbkit.models import LanguageModel
from nbkit.moments import SecondMoments
from nbkit.prompts import check_length, find_subjects, named, subject_kind, target_ids
from nbkit.replay import Prefixes, Replay, WholePasses, can_replay
from nbkit.requests import EditRequest

REASONS = ("steps", "loss", "nan")  # for which the search for v* stops
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
    batch_size: int | None = None,
) -> list[Edit]:
    """One edit a request, each of the model as it is. The model is unchanged afterwards.

    Edits are computed side by side, `batch_size` at once or as many as memory takes; they do not see each other.
    """
    jobs = [_job(lm, request, context_templates) for request in requests]
    prefixes = Prefixes(lm, context_templates) if can_replay(lm) else None

    def batch(places: Sequence[int]) -> dict[int, Edit]:
        chosen = [jobs[place] for place in places]
        found, optimised = optimise_values(lm, chosen, prefixes, parameters)
        return dict(zip(places, _edits(lm, chosen, found, optimised, second_moments, parameters), strict=True))

    order = sorted(range(len(jobs)), key=lambda place: jobs[place].shape)  # those of like length share a batch
    edits: dict[int, Edit] = {}
    with tqdm(total=len(jobs), desc="rome", unit="edit", disable=not progress) as bar:
        for made in in_batches(order, batch_size or _batch_size(lm, jobs, parameters.layer), batch):
            edits |= made
            bar.update(len(made))
    return [edits[place] for place in range(len(jobs))]


@dataclass(frozen=True)
class _Job:
    """One request as rows of tokens: its prompt with the target behind every template, then "{subject} is a"."""

    request: EditRequest
    rows: list[list[int]]
    indices: list[int]  # in each row, the subject's last token
    target: list[int]

    @property
    def wanted(self) -> list[list[int]]:
        """The tokens of each row whose logits the loss needs: before each of the target's; of the last, its subject."""
        first = [len(row) - len(self.target) for row in self.rows[:-1]]
        return [list(range(start, start + len(self.target))) for start in first] + [[self.indices[-1]]]

    @property
    def shape(self) -> tuple[int, int]:
        """The most tokens from the subject's last on, and before it: what the cost of a batch's padding depends on."""
        return max(len(r) - i for r, i in zip(self.rows, self.indices, strict=True)), max(self.indices)


def _job(lm: LanguageModel, request: EditRequest, context_templates: Sequence[str]) -> _Job:
    with named(request):
        target = target_ids(lm, request.target_new)
        prompts = [*in_contexts(request, context_templates), KL_PROMPT]
        rows, indices = find_subjects(lm, prompts, [request.subject] * len(prompts))
        # The target's last token is only ever predicted, never read.
        job = _Job(request, [[*row, *target[:-1]] for row in rows[:-1]] + [rows[-1]], indices, target)
        for row in job.rows:
            check_length(lm, row)
    return job


def _batch_size(lm: LanguageModel, jobs: Sequence[_Job], layer: int) -> int:
    """Edits at once by the formula in `memory.Footprint`, for the longest of the jobs."""
    after, before = (max(sizes) for sizes in zip(*(job.shape for job in jobs), strict=True)) if jobs else (1, 1)
    n_rows, n_logits = max(len(job.rows) for job in jobs), max(len(job.target) for job in jobs)
    row = Footprint(after, before, lm.n_layers - 1 - layer, n_logits, backward=True)
    return budget(lm.device) // (n_rows * row.bytes(lm))


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
    jobs: Sequence[_Job],
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


def optimise_values(
    lm: LanguageModel, jobs: Sequence[_Job], prefixes: Prefixes | None, parameters: RomeParameters
) -> tuple[KeyPass, list[OptimisedValue]]:
    """Find each job's δ, added to the value at the subject's last token, that makes the model say the target after
    every prompt.

    loss = mean over prompts of the target's negative log-likelihood (mean over its tokens)
         + kl_factor · KL(p ‖ p₀) of the token after the subject in "{subject} is a", p₀ that of δ = 0
         + v_weight_decay · ‖δ‖ / ‖value_init‖²

    The KL term is as in the published code, and so in its numbers: at the subject's last token, where δ is added, not
    at the prompt's end, and of p from p₀, not of p₀ from p.
    A loss that is not finite ends it; the edit is then made with the δ reached, and says so ("nan").

    prefixes: the context templates', for the short passes of `Replay`; None takes whole ones, which give the same.
    Adam works element by element and each loss depends on its own δ only, so the jobs do not see each other. One that
    is done keeps its δ, and leaves the batch.
    """
    n_rows = [len(job.rows) for job in jobs]
    arguments = (
        lm,
        parameters.layer,
        [row for job in jobs for row in job.rows],
        [index for job in jobs for index in job.indices],
        [tokens for job in jobs for tokens in job.wanted],
        [number for number, n in enumerate(n_rows) for _ in range(n)],
    )
    if prefixes is None:
        passes = WholePasses(*arguments)
    else:  # the last row of each job, "{subject} is a", has the prefix of the empty template
        templates = [*range(n_rows[0] - 1), 0] * len(jobs)
        passes = Replay(*arguments, templates, prefixes)
    keys, values = (widened(part).unflatten(0, (len(jobs), -1))[:, :-1] for part in (passes.keys, passes.values))
    search = _Search(passes, jobs, values[:, 0].clone(), parameters)
    for step in range(parameters.v_num_grad_steps):
        search.step(last=step == parameters.v_num_grad_steps - 1)
        # Looking how many are left makes a GPU wait for all that was asked of it, so it is not done at every step.
        if lm.device.type == "cpu" or step % 4 == 3:
            if search.leave_finished():
                break
    return KeyPass(keys, values), search.results()


class _Search:
    """Adam on the δ of all edits of a batch: their state, tensors with one row an edit, and where finished ones go."""

    def __init__(
        self,
        passes: Replay | WholePasses,
        jobs: Sequence[_Job],
        value_init: Float[Tensor, "edit d_model"],
        parameters: RomeParameters,
    ):
        self.passes, self.parameters = passes, parameters
        self.value_norm = value_init.norm(dim=-1)
        self.delta = torch.zeros_like(value_init, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.delta], lr=parameters.v_lr)
        self.places = list(range(len(jobs)))  # of the edits still in the batch
        self.lengths = [len(job.target) for job in jobs]
        self._index(jobs)
        n, device = len(jobs), value_init.device
        self.n_losses = torch.zeros(n, dtype=torch.long, device=device)  # those until an edit stopped, itself included
        self.losses = torch.empty(0, n, 4, dtype=value_init.dtype, device=device)  # (step, edit, part)
        self.probability = torch.zeros(n, dtype=value_init.dtype, device=device)
        self.going = torch.ones(n, dtype=torch.bool, device=device)
        self.reason = torch.zeros(n, dtype=torch.long, device=device)  # an index into REASONS
        self.essence_before: Tensor | None = None
        self.done: dict[int, OptimisedValue] = {}

    def _index(self, jobs: Sequence[_Job]) -> None:
        """Which of the wanted logits are targets', of what token and prompt, and which are the KL term's."""
        targets, prompts, is_kl = [], [], []
        for number, job in enumerate(jobs):
            n_prompts = len(job.rows) - 1
            targets += job.target * n_prompts + [0]
            prompts += [number * n_prompts + prompt for prompt in range(n_prompts) for _ in job.target] + [-1]
            is_kl += [False] * (n_prompts * len(job.target)) + [True]
        device = self.delta.device
        is_kl = torch.tensor(is_kl, device=device)
        self.of_kl, self.of_target = is_kl.nonzero()[:, 0], (~is_kl).nonzero()[:, 0]
        self.targets = torch.tensor(targets, device=device)[self.of_target]
        self.prompts = torch.tensor(prompts, device=device)[self.of_target]
        self.target_lengths = torch.tensor(self.lengths, device=device)
        self.jobs = list(jobs)

    def step(self, last: bool) -> None:
        """One loss of every edit, and, except at the last, one step of those that go on."""
        losses, nlls = self._losses()
        total = losses[:, 0]
        with torch.no_grad():
            self.losses = torch.cat([self.losses, losses.detach()[None]])
            self.n_losses += self.going
            probability = (-nlls.detach()).exp().mean(1)
            self.probability = torch.where(self.going, probability, self.probability)
            broken, good = ~total.isfinite(), total < self.parameters.early_stop_loss
            self.reason = torch.where(self.going & broken, 2, torch.where(self.going & good, 1, self.reason))
            self.going &= ~(broken | good)
        if last:
            return
        self.optimiser.zero_grad()
        total.sum().backward()
        before = self.delta.detach().clone()
        self.optimiser.step()
        with torch.no_grad():
            norm, largest = self.delta.norm(dim=-1), self.parameters.clamp_norm_factor * self.value_norm
            clamped = torch.where((norm > largest)[:, None], self.delta * (largest / norm)[:, None], self.delta)
            self.delta.copy_(torch.where(self.going[:, None], clamped, before))

    def _losses(self) -> tuple[Float[Tensor, "edit part"], Float[Tensor, "edit prompt"]]:
        """[total, nll, kl, weight decay] of each edit, and the target's nll by prompt."""
        log_probabilities = widened(self.passes.logits(self.delta)).log_softmax(-1)  # (wanted, vocabulary)
        of_targets = log_probabilities[self.of_target].gather(-1, self.targets[:, None])[:, 0]
        n_edits = len(self.delta)
        sums = torch.zeros(n_edits * (len(self.jobs[0].rows) - 1), dtype=of_targets.dtype, device=of_targets.device)
        nlls = -sums.index_add(0, self.prompts, of_targets).unflatten(0, (n_edits, -1)) / self.target_lengths[:, None]
        essence = log_probabilities[self.of_kl]  # (edit, vocabulary)
        if self.essence_before is None:
            self.essence_before = essence.detach()
        nll = nlls.mean(1)
        kl = self.parameters.kl_factor * (essence.exp() * (essence - self.essence_before)).sum(-1)
        weight_decay = self.parameters.v_weight_decay * self.delta.norm(dim=-1) / self.value_norm**2
        return torch.stack([nll + kl + weight_decay, nll, kl, weight_decay], 1), nlls

    def leave_finished(self) -> bool:
        """Take finished edits out of the batch, if that is a good part of it; whether all are finished."""
        going = self.going.tolist()
        if not any(going):
            return True
        if sum(going) > 0.9 * len(going):
            return False
        self._note([number for number, goes in enumerate(going) if not goes])
        kept = self.going.nonzero()[:, 0]
        self.passes.select(kept)
        for name in ("value_norm", "n_losses", "probability", "reason", "going", "essence_before"):
            setattr(self, name, getattr(self, name)[kept])
        self.losses = self.losses[:, kept]
        state = self.optimiser.state[self.delta]
        self.places = [self.places[number] for number in kept.tolist()]
        self.lengths = [self.lengths[number] for number in kept.tolist()]
        self.delta = self.delta.detach()[kept].requires_grad_()
        self.optimiser = torch.optim.Adam([self.delta], lr=self.parameters.v_lr)
        self.optimiser.state[self.delta] = {
            name: value[kept] if value.dim() else value for name, value in state.items()
        }
        self._index([self.jobs[number] for number in kept.tolist()])
        return False

    def _note(self, numbers: Sequence[int]) -> None:
        """Keep what was found for these edits of the batch."""
        losses, n_losses = self.losses.transpose(0, 1).tolist(), self.n_losses.tolist()
        reasons, probability = self.reason.tolist(), self.probability.tolist()
        for number in numbers:
            self.done[self.places[number]] = OptimisedValue(
                self.delta.detach()[number].clone(),
                losses[number][: n_losses[number]],
                probability[number],
                REASONS[reasons[number]],
            )

    def results(self) -> list[OptimisedValue]:
        self._note([number for number in range(len(self.places)) if self.places[number] not in self.done])
        return [self.done[place] for place in sorted(self.done)]
