"""The search for v*: the value that makes the model say the target, found by Adam, many edits side by side.

What ROME and its relatives have in common, whatever they then do with v*. Meng et al., Locating and Editing Factual
Associations in GPT, eq. 4, as in the published code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.errors import MethodError
from nbkit.keys.extract import KeyPass, in_contexts, widened
from nbkit.methods.method import Setting, side_by_side
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import check_length, find_subjects, named, target_ids
from nbkit.models.replay import Passes, Site, can_replay, passes_of
from nbkit.models.rows import EditedRows
from nbkit.records.requests import EditRequest

REASONS = ("steps", "loss", "nan")  # for which the search for v* stops
KL_PROMPT = "{} is a"  # what follows the subject's last token in it shall not move: the subject stays what it is


@dataclass(frozen=True)
class ValueParameters:
    """Hyper-parameters of the search; their defaults by model are in hparams.toml."""

    v_lr: float  # of Adam, on v*
    v_num_grad_steps: int  # losses computed at most; the last one makes no step
    v_weight_decay: float  # times ‖δ‖ / ‖value_init‖²
    clamp_norm_factor: float  # ‖δ‖ is kept below so many times ‖value_init‖
    kl_factor: float
    early_stop_loss: float  # stop once the total loss is below

    def __post_init__(self):
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


@dataclass(frozen=True)
class ValueJob:
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


def value_job(lm: LanguageModel, request: EditRequest, context_templates: Sequence[str]) -> ValueJob:
    with named(request):
        target = target_ids(lm, request.target_new)
        prompts = [*in_contexts(request, context_templates), KL_PROMPT]
        rows, indices = find_subjects(lm, prompts, [request.subject] * len(prompts))
        # The target's last token is only ever predicted, never read; nor is what follows the subject in the last row.
        read = [[*row, *target[:-1]] for row in rows[:-1]] + [rows[-1][: indices[-1] + 1]]
        job = ValueJob(request, read, indices, target)
        for row in job.rows:
            check_length(lm, row)
    return job


def values_in_batches(
    lm: LanguageModel, jobs: Sequence[ValueJob], setting: Setting, layer: int, site: Site = "projection", name: str = ""
) -> Iterator[tuple[list[int], KeyPass, list[OptimisedValue]]]:
    """`optimise_values` for any number of jobs: as many side by side as `setting` says, or as memory takes.

    Yields which jobs, what `optimise_values` gives for them. `name`: of the bar, where `setting` asks for one.
    """
    prefixes = Prefixes.of_templates(lm, setting.context_templates) if can_replay(lm) else None

    def batch(places: Sequence[int]) -> tuple[KeyPass, list[OptimisedValue]]:
        return optimise_values(lm, [jobs[place] for place in places], prefixes, setting.parameters, layer, site)

    shapes = [job.shape for job in jobs]
    for places, done in side_by_side(setting, shapes, edits_at_once(lm, jobs, layer), batch, name):
        yield places, *done


def edits_at_once(lm: LanguageModel, jobs: Sequence[ValueJob], layer: int) -> int:
    """Edits at once by the formula in `memory.Footprint`, for the longest of the jobs."""
    after, before = (max(sizes) for sizes in zip(*(job.shape for job in jobs), strict=True)) if jobs else (1, 1)
    n_rows, n_logits = max(len(job.rows) for job in jobs), max(len(job.target) for job in jobs)
    row = Footprint(after, before, lm.n_layers - 1 - layer, n_logits, backward=True)
    return budget(lm.device) // (n_rows * row.bytes(lm))


def optimise_values(
    lm: LanguageModel,
    jobs: Sequence[ValueJob],
    prefixes: Prefixes | None,
    parameters: ValueParameters,
    layer: int,
    site: Site = "projection",
) -> tuple[KeyPass, list[OptimisedValue]]:
    """Find each job's δ, added at the subject's last token, that makes the model say the target after every prompt.

    loss = mean over prompts of the target's negative log-likelihood (mean over its tokens)
         + kl_factor · KL(p ‖ p₀) of the token after the subject in "{subject} is a", p₀ that of δ = 0
         + v_weight_decay · ‖δ‖ / ‖value_init‖²

    site: what δ is added to, and whose unprefixed state is value_init: what the "projection" of `layer` says (ROME's v)
    or the residual stream behind its "block" (MEMIT's z). The two differ where a norm follows the projection.

    The KL term is as in the published code, and so in its numbers: at the subject's last token, where δ is added, not
    at the prompt's end, and of p from p₀, not of p₀ from p.
    A loss that is not finite ends it; the edit is then made with the δ reached, and says so ("nan").

    prefixes: the context templates', for the short passes of `Replay`; None takes whole ones, which give the same.
    Adam works element by element and each loss depends on its own δ only, so the jobs do not see each other. One that
    is done keeps its δ, and leaves the batch.

    Returns keys (edit, template, d_mlp) and states at the site (edit, template, d_model) of the unchanged model, and
    what was found for each job.
    """
    rows = EditedRows(
        tokens=[row for job in jobs for row in job.rows],
        indices=[index for job in jobs for index in job.indices],
        templates=[*range(len(jobs[0].rows) - 1), 0] * len(jobs),  # "{subject} is a" has the empty template's prefix
        wanted=[tokens for job in jobs for tokens in job.wanted],
        edits=[number for number, job in enumerate(jobs) for _ in job.rows],
    )
    passes = passes_of(lm, layer, rows, prefixes, site)
    keys, states = (widened(part).unflatten(0, (len(jobs), -1))[:, :-1] for part in (passes.keys, passes.states))
    search = _Search(passes, jobs, states[:, 0].clone(), parameters)
    for step in range(parameters.v_num_grad_steps):
        search.step(last=step == parameters.v_num_grad_steps - 1)
        # Looking how many are left makes a GPU wait for all that was asked of it, so it is not done at every step.
        if lm.device.type == "cpu" or step % 4 == 3:
            if search.leave_finished():
                break
    return KeyPass(keys, states), search.results()


class _Search:
    """Adam on the δ of all edits of a batch: their state, tensors with one row an edit, and where finished ones go."""

    def __init__(
        self,
        passes: Passes,
        jobs: Sequence[ValueJob],
        value_init: Float[Tensor, "edit d_model"],
        parameters: ValueParameters,
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

    def _index(self, jobs: Sequence[ValueJob]) -> None:
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
