"""FT: constrained fine-tuning of MLP projections: Adam on their weights, which may not go far from where they were.

    after every step   W ← clamp(W, W₀ - ε, W₀ + ε), entry by entry, with ε = norm_constraint

With `bias`, as published, the projections' biases are trained and clamped in the same way, in a model that has them
(GPT-2 and GPT-J do, Llama and Mistral do not).

The loss of a request is the mean over its target's tokens of -log p(token | what it is predicted from):

| objective     | every token of the target is predicted from    | known as                                       |
|---------------|------------------------------------------------|------------------------------------------------|
| "prompt_last" | the prompt alone, whichever its place          | FT-L, FT as published with ROME                |
| "target"      | the prompt and the target's tokens before it   | FT-M, ordinary teacher forcing                 |

For a target of several tokens the first is no language model's loss: it asks for all of them at the same place.

Unlike the published code, a batch is one step of all its requests, not one for every few of them; an edit of one
request is the same. With `minibatch_size` each pass over a batch makes a step for every so many of its requests, drawn
anew (breadth first), where a sequence of single edits goes on with each until it is said (depth first). Steps whose
loss is below `early_stop_loss` are left out, and training ends with a pass whose mean is. That, FT-M and `end_of_text`,
which asks for the end of the text behind the target, are LocFT-BF, one bias-free projection at an early layer or a
late one; requests are drawn by `seed`.

Zhu et al., Modifying Memories in Transformer Models; as a baseline in Meng et al., Locating and Editing Factual
Associations in GPT, whose settings these are; the names FT-L and FT-M are EasyEdit's. Yang et al., Fine-tuning Done
Right in Model Editing (LocFT-BF).

`Edit.info` holds losses (one [loss] a pass), target_probability (geometric mean over the target's tokens, each
predicted as the objective has it, mean over requests, in the last pass, which comes before its step),
stop_reason ("loss" | "steps" | "nan"), update_norm ‖ΔW‖_F over all layers, biases included, layers, and of an edit of
one request subject_kind. The updates are on the CPU: a full matrix an edit is soon more than a GPU has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense
from nbkit.keys.extract import widened
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made
from nbkit.models.continuations import Continuation, row_bytes, wished
from nbkit.models.edited import Changes, SharedPass, WholePass
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import budget, in_order
from nbkit.models.replay import can_replay
from nbkit.records.bars import steps
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest

OBJECTIVES = ("prompt_last", "target")
COPIES = 6  # of a weight that an edit takes: its update, gradient, two moments; stacked with others', and that one's


@dataclass(frozen=True)
class FinetuneParameters(Bounded):
    """Hyper-parameters of FT; their defaults by model are in hparams.toml."""

    layers: tuple[int, ...] = bounded(about="whose MLP projections are trained")
    objective: str = bounded(choices=OBJECTIVES, about="prompt_last is FT-L, target FT-M")
    n_steps: int = bounded(least=1, about="passes over the requests at most, each of one step or one a minibatch")
    lr: float = bounded(above=0, about="learning rate of Adam, on the weights")
    weight_decay: float = bounded(least=0, about="of Adam: so many times the weight is added to its gradient")
    norm_constraint: float = bounded(least=0, about="ε, how far an entry may move; 0: no bound")
    early_stop_loss: float = bounded(least=0, about="stop, without another step, once the loss is below")
    bias: bool = bounded(about="whether the projections' biases are trained too, where there are any")
    minibatch_size: int = bounded(least=0, about="so many of a batch's requests make a step; 0: all of them")
    end_of_text: bool = bounded(about="whether the end of the text is asked for too, behind the target")
    seed: int = bounded(least=0, about="of the order in which requests are drawn for minibatches")


def finetune_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request. Adam and the clamp work element by element and each loss depends on its own update only, so
    those computed side by side do not see each other."""
    parameters: FinetuneParameters = settings.parameters
    asked = wished(lm, requests, parameters.objective == "target", parameters.end_of_text)
    lowest = min(map(lm.check_layer, parameters.layers))
    room = _matrix_bytes(lm, parameters) + row_bytes(lm, asked, lowest)  # of one edit

    def edits(places: Sequence[int]) -> list[Edit]:
        rows = RowsOfEdits(lm, [asked[place] for place in places], torch.arange(len(places))[:, None], lowest)
        tunings = _tune(lm, [rows], len(places), parameters, name)
        of_places = zip(places, tunings, strict=True)
        return [_tuned_edit(lm, [requests[place]], tuning, settings) for place, tuning in of_places]

    lengths = [len(each.row) for each in asked]
    name = f"{lm.title}: {settings.method}"
    return in_order(batches_by_cost(settings, lengths, budget(lm.device) // room, edits, name))


def finetune_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit for all requests: its loss is the mean of theirs.

    The gradient of a step is added up over as many requests at once as memory takes.
    """
    parameters: FinetuneParameters = settings.parameters
    asked = wished(lm, requests, parameters.objective == "target", parameters.end_of_text)
    asked = sorted(asked, key=lambda each: len(each.row))
    lowest = min(map(lm.check_layer, parameters.layers))
    size = max(1, (budget(lm.device) - _matrix_bytes(lm, parameters)) // row_bytes(lm, asked, lowest))
    chunks = [asked[start : start + size] for start in range(0, len(asked), size)]
    parts = [RowsOfEdits(lm, chunk, torch.arange(len(chunk))[None], lowest) for chunk in chunks]
    bar = f"{lm.title}: {settings.method}"
    (tuning,) = _tune(lm, parts, 1, parameters, bar, settings.progress)
    return _tuned_edit(lm, requests, tuning, settings)


def _trained(lm: LanguageModel, parameters: FinetuneParameters) -> list[str]:
    """The names of the weights, and of the biases where they are trained."""
    names = []
    for layer in parameters.layers:
        names.append(lm.weight_name(layer))
        if parameters.bias and getattr(lm.projection(layer), "bias", None) is not None:
            names.append(lm.architecture.projection_path(layer) + ".bias")
    return names


def _matrix_bytes(lm: LanguageModel, parameters: FinetuneParameters) -> int:
    wide = torch.promote_types(lm.dtype, torch.float32).itemsize
    return COPIES * wide * len(parameters.layers) * lm.d_model * (lm.d_mlp + parameters.bias)


class RowsOfEdits:
    """Rows read once up to `lowest`, the first layer that is changed; how the changed weights predict their targets.

    grid: for each edit, which of `asked` are its own.
    """

    def __init__(self, lm: LanguageModel, asked: Sequence[Continuation], grid: Int[Tensor, "edit row"], lowest: int):
        self.lm, self.asked, self.grid = lm, asked, grid
        rows = [each.row for each in asked]
        self.passes = SharedPass(lm, lowest, rows) if can_replay(lm) else WholePass(lm, rows)

    @property
    def n_rows(self) -> int:
        """Of every edit."""
        return self.grid.shape[1]

    def nlls(self, changes: Changes, edits: Sequence[int], rows: Int[Tensor, " row"]) -> Float[Tensor, "edit row"]:
        """The target's negative log-likelihood, mean over its tokens, in these of these edits' rows. Differentiable."""
        device, grid = self.lm.device, self.grid[list(edits)][:, rows]
        asked = [self.asked[number] for number in grid.flatten().tolist()]
        kept = [range(each.predicting[0], each.predicting[-1] + 1) for each in asked]
        logits = self.passes.logits(changes, grid.to(device), kept)
        log_probabilities = widened(logits).log_softmax(-1)  # (kept, vocabulary)
        most, first = max(len(each.target) for each in asked), 0
        places, tokens, shares = [], [], []
        for each, positions in zip(asked, kept, strict=True):
            n = len(each.target)
            filler = [n - 1] * (most - n)  # its last token again, with a share of 0
            places.append([first + each.predicting[at] - positions[0] for at in [*range(n), *filler]])
            tokens.append([each.target[at] for at in [*range(n), *filler]])
            shares.append([1 / n] * n + [0] * len(filler))
            first += len(positions)
        picked = log_probabilities[torch.tensor(places, device=device), torch.tensor(tokens, device=device)]
        return -(picked * torch.tensor(shares, dtype=picked.dtype, device=device)).sum(1).reshape(grid.shape)


@dataclass
class Tuning:
    """The updates of one edit on their way, and what was seen at every step."""

    deltas: dict[str, Dense]  # by weight name
    losses: list[list[float]] = field(default_factory=list)
    target_probability: float = 0.0
    stop_reason: str = "steps"

    @property
    def matrices(self) -> list[Float[Tensor, "d_out d_in"]]:
        return [delta.matrix for delta in self.deltas.values()]


def _tune(
    lm: LanguageModel,
    parts: Sequence[RowsOfEdits],
    n_edits: int,
    parameters: FinetuneParameters,
    name: str,
    progress: bool = False,
) -> list[Tuning]:
    """Adam on the updates of all edits, whose rows are in `parts`; one that is done keeps its own, and leaves.

    A loss that is not finite ends an edit, which is then as far as it came, and says so ("nan"). name: of the bar.
    """
    wide = torch.promote_types(lm.dtype, torch.float32)
    weights = {name: lm.oriented(name) for name in _trained(lm, parameters)}
    blank = {"dtype": wide, "device": lm.device, "requires_grad": True}
    tunings = [Tuning({n: Dense(torch.zeros(*w.shape, **blank)) for n, w in weights.items()}) for _ in range(n_edits)]
    # Those without a gradient are passed over, and so keep what they are.
    matrices = [matrix for tuning in tunings for matrix in tuning.matrices]
    optimiser = torch.optim.Adam(matrices, lr=parameters.lr, fused=True)
    n_rows = sum(part.n_rows for part in parts)
    generator = torch.Generator().manual_seed(parameters.seed)
    going = list(range(n_edits))
    for _ in steps(range(parameters.n_steps), name, "step", progress):
        seen = {edit: [0.0, 0.0] for edit in going}  # loss and probability, means over the pass
        for rows in _minibatches(n_rows, parameters.minibatch_size, generator):
            optimiser.zero_grad()
            of_rows = _backward(lm, parts, tunings, going, rows)
            moved = []
            for edit, numbers in zip(list(going), of_rows, strict=True):
                share, (loss, _) = len(rows) / n_rows, numbers
                seen[edit] = [mean + share * number for mean, number in zip(seen[edit], numbers, strict=True)]
                if loss >= parameters.early_stop_loss and isfinite(loss):
                    moved.append(tunings[edit])
                else:
                    for matrix in tunings[edit].matrices:
                        matrix.grad = None
                if not isfinite(loss):
                    going.remove(edit)
            _step(optimiser, moved, weights, parameters)
        for edit, (loss, probability) in seen.items():
            tuning = tunings[edit]
            tuning.losses.append([loss])
            tuning.target_probability = probability
            if isfinite(loss) and loss >= parameters.early_stop_loss:
                continue
            tuning.stop_reason = "loss" if isfinite(loss) else "nan"
            going = [other for other in going if other != edit]
            for matrix in tuning.matrices:
                matrix.grad = None
                optimiser.state.pop(matrix, None)
        if not going:
            break
    return tunings


def _minibatches(n_rows: int, size: int, generator: torch.Generator) -> Sequence[Int[Tensor, " row"]]:
    """The numbers of all rows, in an order that is drawn, so many at a time; all together where they are no more."""
    if not 0 < size < n_rows:
        return [torch.arange(n_rows)]
    return torch.randperm(n_rows, generator=generator).split(size)


def _backward(
    lm: LanguageModel,
    parts: Sequence[RowsOfEdits],
    tunings: Sequence[Tuning],
    edits: Sequence[int],
    rows: Int[Tensor, " row"],
) -> list[list[float]]:
    """Adds the gradients of each edit's mean loss over these of its rows; returns the loss, and the probability."""
    seen, first = 0, 0
    for part in parts:
        own = rows[(rows >= first) & (rows < first + part.n_rows)] - first
        first += part.n_rows
        if not len(own) or not edits:
            continue
        nlls = part.nlls(Changes(lm, [Edit(tunings[edit].deltas) for edit in edits]), edits, own)
        losses = nlls.sum(1) / len(rows)
        losses.sum().backward()
        seen = seen + torch.stack([losses.detach(), (-nlls.detach()).exp().sum(1) / len(rows)], 1)
    return seen.tolist() if edits else []


@torch.no_grad()
def _step(
    optimiser: torch.optim.Adam,
    moved: Sequence[Tuning],
    weights: dict[str, Float[Tensor, "d_out d_in"]],
    parameters: FinetuneParameters,
) -> None:
    """One step of those that have gradients, within the bound."""
    if not moved:
        return
    if parameters.weight_decay:
        for name, delta in (named for tuning in moved for named in tuning.deltas.items()):
            delta.matrix.grad.add_(weights[name] + delta.matrix, alpha=parameters.weight_decay)
    optimiser.step()
    if parameters.norm_constraint:
        for matrix in (matrix for tuning in moved for matrix in tuning.matrices):
            matrix.clamp_(-parameters.norm_constraint, parameters.norm_constraint)


def _tuned_edit(lm: LanguageModel, requests: Sequence[EditRequest], tuning: Tuning, settings: MethodSettings) -> Edit:
    info = {
        "losses": tuning.losses,
        "target_probability": tuning.target_probability,
        "stop_reason": tuning.stop_reason,
        "update_norm": float(torch.stack([matrix.detach().norm() for matrix in tuning.matrices]).norm()),
        "layers": ", ".join(map(str, settings.parameters.layers)),
    }
    deltas = {name: Dense(delta.matrix.detach().cpu()) for name, delta in tuning.deltas.items()}
    return edit_made(lm, requests, settings, deltas, info)
