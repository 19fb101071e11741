"""FT: constrained fine-tuning of MLP projections: Adam on their weights, which may not go far from where they were.

    after every step   W ← clamp(W, W₀ - ε, W₀ + ε), entry by entry, with ε = norm_constraint

The loss of a request is the mean over its target's tokens of -log p(token | what it is predicted from):

| objective     | every token of the target is predicted from    | known as                                       |
|---------------|------------------------------------------------|------------------------------------------------|
| "prompt_last" | the prompt alone, whichever its place          | FT-L, FT as published with ROME                |
| "target"      | the prompt and the target's tokens before it   | FT-M, ordinary teacher forcing                 |

For a target of several tokens the first is no language model's loss: it asks for all of them at the same place.

Zhu et al., Modifying Memories in Transformer Models; as a baseline in Meng et al., Locating and Editing Factual
Associations in GPT, whose settings these are; the names FT-L and FT-M are EasyEdit's.

`Edit.info` holds losses (one [loss] a step), target_probability (geometric mean over the target's tokens, each
predicted as the objective has it, mean over requests, at the last loss, which comes before the last step),
stop_reason ("loss" | "steps" | "nan"), update_norm ‖ΔW‖_F over all layers, layers, and of an edit of one request
subject_kind. The updates are on the CPU: a full matrix an edit is soon more than a GPU has.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError
from nbkit.keys.extract import widened
from nbkit.methods.method import Setting, side_by_side
from nbkit.models.edited import Changes, SharedPass, WholePass
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget
from nbkit.models.prompts import check_length, named, subject_kind, target_ids, tokenize
from nbkit.models.replay import can_replay
from nbkit.records.requests import EditRequest

OBJECTIVES = ("prompt_last", "target")
COPIES = 6  # of a weight that an edit takes: its update, gradient, two moments; stacked with others', and that one's


@dataclass(frozen=True)
class FinetuneParameters:
    """Hyper-parameters of FT; their defaults by model are in hparams.toml."""

    layers: tuple[int, ...]
    objective: str
    n_steps: int  # at most
    lr: float  # of Adam, on the weights
    weight_decay: float  # of Adam: so many times the weight is added to its gradient
    norm_constraint: float  # ε; 0: none
    early_stop_loss: float  # stop, without another step, once the loss is below

    def __post_init__(self):
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise MethodError(f"layers must be one or more different layers, not {list(self.layers)}")
        if self.objective not in OBJECTIVES:
            raise MethodError(f"objective {self.objective!r} is unknown; it is one of {', '.join(OBJECTIVES)}")
        for name in ("n_steps", "lr"):
            if not getattr(self, name) > 0:
                raise MethodError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "norm_constraint", "early_stop_loss"):
            if not getattr(self, name) >= 0:
                raise MethodError(f"{name} must be 0 or above, not {getattr(self, name)}")


def finetune_each(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[Edit]:
    """One edit a request, each of the model as it is. The model is unchanged afterwards.

    Edits are computed side by side, `batch_size` at once or as many as memory takes. Adam and the clamp work element
    by element and each loss depends on its own update only, so they do not see each other.
    """
    parameters: FinetuneParameters = setting.parameters
    jobs = [_job(lm, request, parameters.objective) for request in requests]
    room = _matrix_bytes(lm, parameters) + _row_bytes(lm, jobs, parameters)  # of one edit

    def batch(places: Sequence[int]) -> list[Edit]:
        chosen = [jobs[place] for place in places]
        reading = _Reading(lm, chosen, [[number] for number in range(len(chosen))], parameters)
        tuned = _tune(lm, [reading], len(chosen), parameters)
        return [_edit(lm, [job.request], one, parameters) for job, one in zip(chosen, tuned, strict=True)]

    edits: dict[int, Edit] = {}
    lengths = [len(job.row) for job in jobs]
    for places, made in side_by_side(setting, lengths, budget(lm.device) // room, batch, "ft"):
        edits |= zip(places, made, strict=True)
    return [edits[place] for place in range(len(jobs))]


def finetune_together(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> Edit:
    """One edit for all requests: its loss is the mean of theirs. The model is unchanged afterwards.

    Every step is one of the whole batch, whose gradient is added up over as many requests at once as memory takes.
    """
    parameters: FinetuneParameters = setting.parameters
    jobs = sorted((_job(lm, request, parameters.objective) for request in requests), key=lambda job: len(job.row))
    size = max(1, (budget(lm.device) - _matrix_bytes(lm, parameters)) // _row_bytes(lm, jobs, parameters))
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    readings = [_Reading(lm, chunk, [range(len(chunk))], parameters) for chunk in chunks]
    (tuned,) = _tune(lm, readings, 1, parameters, setting.progress)
    return _edit(lm, requests, tuned, parameters)


@dataclass(frozen=True)
class _Job:
    """A request as tokens: what is read, and for each token of the target the position that predicts it."""

    request: EditRequest
    row: list[int]
    target: list[int]
    asked: list[int]


def _job(lm: LanguageModel, request: EditRequest, objective: str) -> _Job:
    with named(request):
        (prompt,), target = tokenize(lm, [request.text]), target_ids(lm, request.target_new)
        # The target's last token is only ever predicted, never read.
        row = prompt if objective == "prompt_last" else prompt + target[:-1]
        check_length(lm, row)
    asked = range(len(prompt) - 1, len(row)) if objective == "target" else [len(prompt) - 1] * len(target)
    return _Job(request, row, target, list(asked))


def _matrix_bytes(lm: LanguageModel, parameters: FinetuneParameters) -> int:
    wide = torch.promote_types(lm.dtype, torch.float32).itemsize
    return COPIES * wide * len(parameters.layers) * lm.d_model * lm.d_mlp


def _row_bytes(lm: LanguageModel, jobs: Sequence[_Job], parameters: FinetuneParameters) -> int:
    longest = max((len(job.row) for job in jobs), default=1)
    n_logits = max((len(set(job.asked)) for job in jobs), default=1)
    return Footprint(longest, 0, lm.n_layers - min(parameters.layers), n_logits, backward=True).bytes(lm)


class _Reading:
    """Rows read once up to the lowest layer that is changed; how the changed weights predict their targets.

    of_edit: for each edit, the numbers of its jobs.
    """

    def __init__(
        self,
        lm: LanguageModel,
        jobs: Sequence[_Job],
        of_edit: Sequence[Sequence[int]],
        parameters: FinetuneParameters,
    ):
        self.lm, self.jobs, self.of_edit = lm, jobs, of_edit
        rows = [job.row for job in jobs]
        lowest = min(lm.check_layer(layer) for layer in parameters.layers)
        self.passes = SharedPass(lm, lowest, rows) if can_replay(lm) else WholePass(lm, rows)

    def nlls(self, changes: Changes, edits: Sequence[int]) -> Float[Tensor, "edit row"]:
        """The target's negative log-likelihood, mean over its tokens, of these edits' jobs. Differentiable."""
        device, numbers = self.lm.device, [self.of_edit[edit] for edit in edits]
        jobs = [self.jobs[number] for of_one in numbers for number in of_one]
        kept = [range(job.asked[0], job.asked[-1] + 1) for job in jobs]
        grid = torch.tensor([list(of_one) for of_one in numbers], device=device)
        log_probabilities = widened(self.passes.logits(changes, grid, kept)).log_softmax(-1)  # (kept, vocabulary)
        most, first = max(len(job.target) for job in jobs), 0
        places, tokens, shares = [], [], []
        for job, positions in zip(jobs, kept, strict=True):
            n, n_filler = len(job.target), most - len(job.target)
            places.append([first + at - positions[0] for at in job.asked + job.asked[-1:] * n_filler])
            tokens.append(job.target + job.target[-1:] * n_filler)
            shares.append([1 / n] * n + [0] * n_filler)
            first += len(positions)
        picked = log_probabilities[torch.tensor(places, device=device), torch.tensor(tokens, device=device)]
        return -(picked * torch.tensor(shares, dtype=picked.dtype, device=device)).sum(1).reshape(grid.shape)


@dataclass
class _Tuned:
    matrices: dict[str, Tensor]  # ΔW (d_out, d_in) by weight name
    losses: list[list[float]] = field(default_factory=list)
    target_probability: float = 0.0
    stop_reason: str = "steps"


def _tune(
    lm: LanguageModel,
    readings: Sequence[_Reading],
    n_edits: int,
    parameters: FinetuneParameters,
    progress: bool = False,
) -> list[_Tuned]:
    """Adam on the updates of all edits; one that is done keeps its own, and leaves.

    A loss that is not finite ends an edit, which is then as far as it came, and says so ("nan").
    """
    wide = torch.promote_types(lm.dtype, torch.float32)
    stored = {lm.weight_name(layer): lm.weight(layer) for layer in parameters.layers}
    weights = {name: weight.T if lm.architecture.transposed else weight for name, weight in stored.items()}
    blank = {"dtype": wide, "device": lm.device, "requires_grad": True}
    tuned = [_Tuned({name: torch.zeros(*w.shape, **blank) for name, w in weights.items()}) for _ in range(n_edits)]
    # Those without a gradient are passed over, and so keep what they are.
    optimiser = torch.optim.Adam([m for one in tuned for m in one.matrices.values()], lr=parameters.lr, fused=True)
    n_rows = sum(len(reading.of_edit[0]) for reading in readings)  # of every edit
    going = list(range(n_edits))
    for _ in tqdm(range(parameters.n_steps), desc="ft", unit="step", disable=not progress):
        optimiser.zero_grad()
        seen = torch.zeros(len(going), 2, dtype=wide, device=lm.device)  # (edit, loss and probability)
        for reading in readings:
            deltas = [{name: Dense(matrix) for name, matrix in tuned[edit].matrices.items()} for edit in going]
            nlls = reading.nlls(Changes(lm, [Edit(of_one) for of_one in deltas]), going)
            losses = nlls.sum(1) / n_rows
            losses.sum().backward()
            seen += torch.stack([losses.detach(), (-nlls.detach()).exp().sum(1) / n_rows], 1)
        for edit, (loss, probability) in zip(list(going), seen.tolist(), strict=True):
            one = tuned[edit]
            one.losses.append([loss])
            one.target_probability = probability
            if isfinite(loss) and loss >= parameters.early_stop_loss:
                continue
            one.stop_reason = "loss" if isfinite(loss) else "nan"
            going.remove(edit)
            for matrix in one.matrices.values():
                matrix.grad = None
                optimiser.state.pop(matrix, None)
        if not going:
            break
        with torch.no_grad():
            for name, matrix in ((n, m) for edit in going for n, m in tuned[edit].matrices.items()):
                if parameters.weight_decay:
                    matrix.grad.add_(weights[name] + matrix, alpha=parameters.weight_decay)
            optimiser.step()
            if parameters.norm_constraint:
                for matrix in (m for edit in going for m in tuned[edit].matrices.values()):
                    matrix.clamp_(-parameters.norm_constraint, parameters.norm_constraint)
    return tuned


def _edit(
    lm: LanguageModel, requests: Sequence[EditRequest], tuned: _Tuned, parameters: FinetuneParameters
) -> Edit:
    matrices = {name: matrix.detach() for name, matrix in tuned.matrices.items()}
    info = {
        "losses": tuned.losses,
        "target_probability": tuned.target_probability,
        "stop_reason": tuned.stop_reason,
        "update_norm": float(torch.stack([matrix.norm() for matrix in matrices.values()]).norm()),
        "layers": ", ".join(map(str, parameters.layers)),
    }
    if len(requests) == 1:
        info["subject_kind"] = subject_kind(lm, requests[0])
    deltas = {name: Dense(matrix.cpu()) for name, matrix in matrices.items()}
    return Edit(deltas, tuple(requests), "ft", asdict(parameters), info)
