"""The search for v*: the value that makes the model say the target, found by Adam, many edits side by side.

What ROME and its relatives have in common, whatever they then do with v*. Meng et al., Locating and Editing Factual
Associations in GPT, eq. 4, as in the published code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, isfinite

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nbkit.keys.extract import KeyPass, in_contexts, widened
from nbkit.methods.method import MethodSettings, batches_by_cost
from nbkit.models.continuations import Continuation
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import check_length, find_subjects, named, target_ids, with_plain
from nbkit.models.replay import Passes, Site, can_replay, passes_of
from nbkit.models.rows import EditedRows
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest

KL_PROMPT = "{} is a"  # what follows the subject's last token in it shall not move: the subject stays what it is


@dataclass(frozen=True)
class ValueParameters(Bounded):
    """Hyper-parameters of the search; their defaults by model are in hparams.toml."""

    v_lr: float = bounded(above=0, about="learning rate of Adam, on v*")
    v_num_grad_steps: int = bounded(least=1, about="losses computed at most; the last one makes no step")
    v_weight_decay: float = bounded(least=0, about="times ‖δ‖ / ‖value_init‖², with v* = value_init + δ")
    clamp_norm_factor: float = bounded(above=0, most=inf, about="‖δ‖ is kept below so many times ‖value_init‖")
    kl_factor: float = bounded(least=0, about="weight of the term that keeps what the subject is")
    early_stop_loss: float = bounded(about="the search stops once the total loss is below")
    stop_after_first_choice: int = bounded(
        least=0, about="the search stops at so many losses with the target the first choice on all prompts; 0: not so"
    )
    value_norm: float = bounded(least=0, about="what ‖v*‖ is brought to, as mean_value_norm measures; 0: left as it is")

    target_init = "unprefixed"  # what v* starts from; a hyper-parameter of ROME's alone
    site = "projection"  # what δ is added to, see `optimise_values`; MEMIT's is another


@dataclass(frozen=True)
class OptimisedValue:
    """v* = value_init + delta, and how it was found."""

    value_init: Float[Tensor, " d_model"]
    delta: Float[Tensor, " d_model"]
    losses: list[list[float]]  # per step [total, nll, kl, weight decay]
    target_probability: float
    stop_reason: str  # "steps" | "loss" | "first choice" | "nan"

    @property
    def value_star(self) -> Float[Tensor, " d_model"]:
        return self.value_init + self.delta


@dataclass(frozen=True)
class ValueJob:
    """One request as rows of tokens: its prompt with the target behind every template, then "{subject} is a".

    The first row is always that of the plain prompt, whose key and state are read. Where "{}" is none of the templates,
    no target is asked for there.
    """

    rows: list[list[int]]
    indices: list[int]  # in each row, the subject's last token
    wanted: list[list[int]]  # in each row, the tokens whose logits the loss needs
    target: list[int]

    @property
    def n_prompts(self) -> int:
        """Behind which the target is asked for."""
        return sum(map(bool, self.wanted)) - 1  # the last row's are the KL term's

    @property
    def shape(self) -> tuple[int, int]:
        """The most tokens from the subject's last on, and before it: what the cost of a batch's padding depends on."""
        return max(len(r) - i for r, i in zip(self.rows, self.indices, strict=True)), max(self.indices)


def value_job(lm: LanguageModel, request: EditRequest, context_templates: Sequence[str]) -> ValueJob:
    with named(request):
        target = target_ids(lm, request.target_new)
        templates = with_plain(context_templates)
        n_silent = len(templates) - len(context_templates)
        prompts = [*in_contexts(request, templates), KL_PROMPT]
        rows, indices = find_subjects(lm, prompts, [request.subject] * len(prompts))
        asked = [Continuation.of(row, target) for row in rows[n_silent:-1]]
        silent = [row[: index + 1] for row, index in zip(rows[:n_silent], indices, strict=False)]
        last = indices[-1]  # of the last row; what follows it there is not read
        read = [*silent, *(each.row for each in asked), rows[-1][: last + 1]]
        for row in read:
            check_length(lm, row)
    return ValueJob(read, indices, [*([] for _ in silent), *(list(each.predicting) for each in asked), [last]], target)


def values_in_batches(
    lm: LanguageModel,
    jobs: Sequence[ValueJob],
    settings: MethodSettings,
    layer: int,
    site: Site = "projection",
    name: str = "targets",
) -> Iterator[tuple[list[int], KeyPass, list[OptimisedValue]]]:
    """`optimise_values` for any number of jobs: as many side by side as `settings` say, or as memory takes.

    Yields which jobs, what `optimise_values` gives for them. `name`: of the bar, where `settings` ask for one.
    """
    prefixes = Prefixes.of_templates(lm, with_plain(settings.context_templates)) if can_replay(lm) else None

    def optimised(places: Sequence[int]) -> tuple[KeyPass, list[OptimisedValue]]:
        return optimise_values(lm, [jobs[place] for place in places], prefixes, settings.parameters, layer, site)

    shapes = [job.shape for job in jobs]
    for places, done in batches_by_cost(settings, shapes, edits_at_once(lm, jobs, layer), optimised, name):
        yield places, *done


def edits_at_once(lm: LanguageModel, jobs: Sequence[ValueJob], layer: int) -> int:
    """Edits at once by the formula in `memory.Footprint`, for the longest of the jobs."""
    if not jobs:
        return 1
    after, before = (max(sizes) for sizes in zip(*(job.shape for job in jobs), strict=True))
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

    site: what δ is added to, and whose unprefixed state (or that of `target_init`) is value_init: what the "projection"
    of `layer` says (ROME's v) or the residual stream behind its "block" (MEMIT's z). The two differ where a norm
    follows the projection.

    The KL term is as in the published code, and so in its numbers: at the subject's last token, where δ is added, not
    at the prompt's end, and of p from p₀, not of p₀ from p.
    A loss that is not finite ends it; the edit is then made with the δ reached, and says so ("nan"). ENCORE's stop
    counts the losses at which the target is the first choice on all prompts, in a row or not (Gupta et al., Lifelong
    Knowledge Editing Requires Better Regularization); its code leaves the plain prompt out, which counts here.

    prefixes: the context templates', for the short passes of `Replay`; None takes whole ones, which give the same.
    Adam works element by element and each loss depends on its own δ only, so the jobs do not see each other. One that
    is done keeps its δ, and leaves the batch.

    Returns keys (edit, template, d_mlp) and states at the site (edit, template, d_model) of the unchanged model, the
    first those of the plain prompt, and what was found for each job.
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
    value_init = initial_value(states, parameters, jobs[0].n_prompts)
    search = _Search(passes, jobs, value_init, parameters)
    for step in range(parameters.v_num_grad_steps):
        search.step(last=step == parameters.v_num_grad_steps - 1)
        # Looking how many are left makes a GPU wait for all that was asked of it, so it is not done at every step.
        if lm.device.type == "cpu" or step % 4 == 3:
            if search.leave_finished():
                break
    return KeyPass(keys, states), search.results()


def initial_value(
    states: Float[Tensor, "edit template d_model"], parameters: ValueParameters, n_templates: int
) -> Float[Tensor, "edit d_model"]:
    """What v* starts from: the plain prompt's state, the first, or the mean over the last `n_templates`."""
    return (states[:, 0] if parameters.target_init == "unprefixed" else states[:, -n_templates:].mean(1)).clone()


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
        self.value_init, self.value_norm = value_init, value_init.norm(dim=-1)
        self.delta = torch.zeros_like(value_init, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.delta], lr=parameters.v_lr)
        self.going = torch.ones(len(jobs), dtype=torch.bool, device=value_init.device)
        # by step: the losses, the target's probability, and at how many losses it has been the first choice
        self.seen: list[Float[Tensor, "edit part"]] = []
        self.essence_before: Tensor | None = None
        self.done: dict[int, OptimisedValue] = {}
        self._index(dict(enumerate(jobs)))

    def _index(self, jobs: dict[int, ValueJob]) -> None:
        """Which of the wanted logits are targets', of what token and prompt, and which are the KL term's.

        jobs: those still in the batch, by their place in it at the start.
        """
        self.jobs, device = jobs, self.delta.device
        targets, prompts, is_kl = [], [], []
        for number, job in enumerate(jobs.values()):
            n_prompts = job.n_prompts
            targets += job.target * n_prompts
            prompts += [number * n_prompts + prompt for prompt in range(n_prompts) for _ in job.target]
            is_kl += [False] * (n_prompts * len(job.target)) + [True]
        self.targets, self.prompts = torch.tensor(targets, device=device), torch.tensor(prompts, device=device)
        is_kl = torch.tensor(is_kl, device=device)
        self.of_kl, self.of_target = is_kl.nonzero()[:, 0], (~is_kl).nonzero()[:, 0]
        self.target_lengths = torch.tensor([len(job.target) for job in jobs.values()], device=device)
        self.n_nlls = len(jobs) * n_prompts

    def step(self, last: bool) -> None:
        """One loss of every edit, and, except at the last, one step of those that go on."""
        losses, nlls, first = self._losses()
        total = losses[:, 0]
        with torch.no_grad():
            n_first = first + self.seen[-1][:, -1] if self.seen else first
            self.seen.append(torch.cat([losses, (-nlls).exp().mean(1, keepdim=True), n_first[:, None]], 1))
            self.going &= ~self._ends(self.seen[-1])
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

    def _ends(self, seen: Float[Tensor, "*step part"]) -> Bool[Tensor, "*step"]:
        """Whether an edit stops at this loss."""
        total, n_first, most = seen[..., 0], seen[..., -1], self.parameters.stop_after_first_choice
        return ~total.isfinite() | (total < self.parameters.early_stop_loss) | (n_first >= (most or inf))

    def _losses(self) -> tuple[Float[Tensor, "edit part"], Float[Tensor, "edit prompt"], Float[Tensor, " edit"]]:
        """[total, nll, kl, weight decay] of each edit, the target's nll by prompt, and 1 if all of its tokens are the
        first choice behind every prompt, else 0 (0 too where that stops no search)."""
        log_probabilities = widened(self.passes.logits(self.delta)).log_softmax(-1)  # (wanted, vocabulary)
        at_targets = log_probabilities[self.of_target]
        of_targets = at_targets.gather(-1, self.targets[:, None])[:, 0]
        sums = of_targets.new_zeros(self.n_nlls).index_add(0, self.prompts, of_targets)
        nlls = -sums.unflatten(0, (len(self.delta), -1)) / self.target_lengths[:, None]
        essence = log_probabilities[self.of_kl]  # (edit, vocabulary)
        if self.essence_before is None:
            self.essence_before = essence.detach()
        nll = nlls.mean(1)
        kl = self.parameters.kl_factor * (essence.exp() * (essence - self.essence_before)).sum(-1)
        weight_decay = self.parameters.v_weight_decay * self.delta.norm(dim=-1) / self.value_norm**2
        first = torch.zeros_like(nll)
        if self.parameters.stop_after_first_choice:
            others = (at_targets.argmax(-1) != self.targets).to(first)
            first = (first.index_add(0, self.prompts // nlls.shape[1], others) == 0).to(first)
        return torch.stack([nll + kl + weight_decay, nll, kl, weight_decay], 1), nlls, first

    def leave_finished(self) -> bool:
        """Take finished edits out of the batch, if that is a good part of it; whether all are finished."""
        going = self.going.tolist()
        if not any(going):
            return True
        if sum(going) > 0.9 * len(going):
            return False
        self._note([not goes for goes in going])
        kept = self.going.nonzero()[:, 0]
        self.passes.select(kept)
        for name in ("value_init", "value_norm", "going", "essence_before"):
            setattr(self, name, getattr(self, name)[kept])
        self.seen = [of_step[kept] for of_step in self.seen]
        state = self.optimiser.state[self.delta]
        self.delta = self.delta.detach()[kept].requires_grad_()
        self.optimiser = torch.optim.Adam([self.delta], lr=self.parameters.v_lr)
        self.optimiser.state[self.delta] = {name: part[kept] if part.dim() else part for name, part in state.items()}
        self._index({place: job for (place, job), goes in zip(self.jobs.items(), going, strict=True) if goes})
        return False

    def _note(self, finished: Sequence[bool]) -> None:
        """Keep what came of these edits of the batch, up to the loss at which each of them stopped."""
        seen = torch.stack(self.seen, 1)  # (edit, step, part)
        ends = self._ends(seen).tolist()
        for number, (place, steps) in enumerate(zip(self.jobs, seen.tolist(), strict=True)):
            if finished[number]:
                stopped = True in ends[number]
                steps = steps[: ends[number].index(True) + 1] if stopped else steps
                self.done[place] = OptimisedValue(
                    self.value_init[number],
                    self.delta.detach()[number].clone(),
                    [losses for *losses, _, _ in steps],
                    target_probability=steps[-1][-2],
                    stop_reason=self._reason(steps[-1][0]) if stopped else "steps",
                )

    def _reason(self, total: float) -> str:
        """Why a search stopped at this loss."""
        of_number = "loss" if total < self.parameters.early_stop_loss else "first choice"
        return of_number if isfinite(total) else "nan"

    def results(self) -> list[OptimisedValue]:
        self._note([True] * len(self.jobs))
        return [self.done[place] for place in sorted(self.done)]
