"""Trains MEND's hypernetwork for one model: edit, ask, and follow the gradient through the edit into the hypernetwork.

    recipe, files = recipe_of(lm.name)
    train_to_file(lm, recipe, files)

Of every request drawn, an edit of the unedited model is made, and the edited model is asked, see `examples`,

1. for the target: its negative log-likelihood;
2. for what should not change: KL(p_unedited ‖ p_edited).

loss = edit_weight · 1 + locality_weight · 2. Mitchell et al., Fast Model Editing at Scale, section 3.3. The numbers
of the published training, and what the shipped hypernetwork's departs from, stand in recipes.toml.

Unlike the published code: the model does not change, so the mean and std that g normalises by are measured once, before
the training, not while it goes on; and the edit rates are learned as logarithms.

Resumable without stored generators: step n draws its examples from a generator seeded with (seed, n). What the
hypernetwork was at its best on requests that are held out is what the training returns.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nbkit import paths
from nbkit.edits.checkpoints import Checkpoint
from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import RequestError
from nbkit.keys.extract import widened
from nbkit.methods.mend.examples import Example, Examples, not_among
from nbkit.methods.mend.gradients import TokenGradients, target_nlls, token_gradients
from nbkit.methods.mend.hypernetwork import Hypernetwork, Transform, mlp_weights
from nbkit.methods.mend.recipe import MendRecipe, TrainingFiles
from nbkit.methods.mend.weights_file import FORMAT, LOG_BESIDE, save_hypernetwork, weights_path
from nbkit.models.continuations import continuations
from nbkit.models.edited import Changes
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import pad
from nbkit.models.rows import marked
from nbkit.records.bars import bar
from nbkit.records.files import write_atomically
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest, read_requests, read_texts

LOG = "training_log.jsonl"
STD_FLOOR = 1e-3  # of the mean standard deviation: what a number that hardly ever changed is divided by


def train_to_file(lm: LanguageModel, recipe: MendRecipe, files: TrainingFiles, progress: bool = True) -> Path:
    """Trains on requests read from files, those about held-out facts left out; returns the file written.

    The log is put beside it.
    """
    requests = not_among(read_requests(files.data), read_requests(files.held_out) if files.held_out else [])
    texts = read_texts(files.texts) if files.texts else []
    work = Path(files.work).expanduser() if files.work else paths.RUNS / "mend" / weights_path(lm.name).parent.name
    hypernetwork = train(lm, requests, texts, recipe, work, progress)
    out = weights_path(lm.name, files.out)
    save_hypernetwork(out, hypernetwork, lm, asdict(recipe))
    log = (work / LOG).read_bytes()
    write_atomically(out.with_name(LOG_BESIDE), lambda file: file.write(log))
    return out


@verb
def train(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    texts: Sequence[str],
    recipe: MendRecipe,
    folder: Path,
    progress: bool = True,
) -> Hypernetwork:
    """Trains, or goes on training; writes a checkpoint and a log to `folder`. The model stays as it is.

    Returns the hypernetwork that was best on the validation requests. RequestError for too few requests, ResultsError
    for a checkpoint that is damaged, or of another recipe, formula, model, or data.
    """
    if len(requests) <= recipe.n_validation:
        raise RequestError(f"{len(requests)} requests are too few to hold out {recipe.n_validation} of them")
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(recipe.seed).permutation(len(requests))
    held_out, used = ([requests[number] for number in part] for part in np.split(order, [recipe.n_validation]))
    validation = Examples(lm, held_out, texts, recipe.text_tokens).draw(
        recipe.n_validation, np.random.default_rng([recipe.seed, 1])
    )
    examples = Examples(lm, used, texts, recipe.text_tokens)
    about = {**asdict(recipe), "formula": FORMAT, "model": lm.base_hash, "data": digest([list(requests), list(texts)])}
    training = MendTraining(lm, recipe, Checkpoint(folder / "checkpoint.safetensors", about))
    if not training.load():
        normalise(lm, training.hypernetwork, used[: recipe.n_normalising], recipe.at_once)
        training.validate(validation)
    name = f"{lm.title}: training of mend"
    with bar(recipe.n_steps, name, "step", progress, done=training.step, delay=0, mininterval=5) as shown:
        for step in range(training.step, recipe.n_steps):
            training.make_step(examples.draw(recipe.batch, np.random.default_rng([recipe.seed, 2, step])))
            if training.step % recipe.validate_every == 0 or training.step == recipe.n_steps:
                training.validate(validation)
                training.save()
                training.write_log(folder / LOG)
                shown.set_postfix(validation=f"{training.log[-1]['validation_loss']:.4f}")
            shown.update()
    training.write_log(folder / LOG)
    return training.best_hypernetwork()


def losses_of(lm: LanguageModel, hypernetwork: Hypernetwork, examples: Sequence[Example]) -> Float[Tensor, "2"]:
    """[the target's nll, KL(p_unedited ‖ p_edited)], each the mean over the examples, through their edits."""
    gradients = token_gradients(lm, [example.edited for example in examples], hypernetwork.shapes)
    changes = changes_of(lm, hypernetwork, gradients)
    with changes.added(lm, changes.factors):
        asked = [example.asked for example in examples]
        nll = target_nlls(lm, pad(lm, [one.row for one in asked]), asked)

    rows, kept = zip(*(part for example in examples for part in example.unchanged), strict=True)
    batch = pad(lm, rows)
    keep = marked(kept, batch.shape[1], lm.device)
    with torch.no_grad():
        before = widened(lm.logits(batch, keep=keep)).log_softmax(-1)  # (token, vocabulary)
    with changes.added(lm, changes.factors):
        after = widened(lm.logits(batch, keep=keep)).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)
    shares = torch.tensor([1 / (len(rows) * len(tokens)) for tokens in kept for _ in tokens], device=lm.device)
    return torch.stack([nll.mean(), (shares.to(divergence.dtype) * divergence).sum()])


def changes_of(lm: LanguageModel, hypernetwork: Hypernetwork, gradients: TokenGradients) -> Changes:
    """The edit of each row of `gradients`, for rows of a pass that come edit by edit; differentiable."""
    factors = list(hypernetwork.factors(gradients))
    rows = range(len(gradients.nll))
    return Changes(lm, [Edit({name: LowRank(left[row], right[row]) for name, left, right in factors}) for row in rows])


def normalise(
    lm: LanguageModel, hypernetwork: Hypernetwork, requests: Sequence[EditRequest], at_once: int
) -> None:
    """Sets mean and std of every g to those of [u; δ] over the tokens that give to the gradients of these requests."""
    sums: dict[Transform, tuple] = {}  # of each: how many tokens, Σ [u; δ], Σ [u; δ]²
    for start in range(0, len(requests), at_once):
        some = requests[start : start + at_once]
        asked = continuations(lm, [request.text for request in some], [request.target_new for request in some])
        gradients = token_gradients(lm, asked, hypernetwork.shapes)
        for name in hypernetwork.shapes:
            gives, transform = gradients.gives[name], hypernetwork.transform_of(name)
            x = torch.cat([gradients.u[name][gives], gradients.delta[name][gives]], -1).double()
            n, total, squares = sums.get(transform, (0, 0, 0))
            sums[transform] = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    for transform, (n, total, squares) in sums.items():
        mean = total / n
        std = (squares / n - mean.square()).clamp(min=0).sqrt()
        parts = [part.clamp(min=STD_FLOOR * float(part.mean())) for part in std.split(transform.sizes)]
        transform.mean.copy_(mean)
        transform.std.copy_(torch.cat(parts))


class MendTraining:
    """State of one training: hypernetwork, optimiser, the best so far, log; and the checkpoint they are kept in."""

    def __init__(self, lm: LanguageModel, recipe: MendRecipe, checkpoint: Checkpoint):
        self.lm, self.recipe, self.checkpoint = lm, recipe, checkpoint
        layers = range(max(0, lm.n_layers - recipe.n_last_layers), lm.n_layers)
        shapes = {name: shape for layer in layers for name, shape in mlp_weights(lm, layer).items()}
        generator = torch.Generator().manual_seed(recipe.seed)
        self.hypernetwork = Hypernetwork(shapes, recipe.rank, recipe.n_hidden, recipe.first_rate, generator)
        self.hypernetwork.to(lm.device, torch.promote_types(lm.dtype, torch.float32))
        groups = [
            {"params": list(self.hypernetwork.transforms.parameters()), "peak": recipe.learning_rate},
            {"params": [self.hypernetwork.log_rate], "peak": recipe.rate_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups)
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.keep_as_best()
        self.losses: list[Tensor] = []  # of the steps since the last record
        self.started = time.perf_counter()

    def keep_as_best(self) -> None:
        self.best = {name: tensor.detach().clone() for name, tensor in self.hypernetwork.state_dict().items()}

    def best_hypernetwork(self) -> Hypernetwork:
        """Ends the training: the hypernetwork becomes what it was at its best."""
        self.hypernetwork.load_state_dict(self.best)
        return self.hypernetwork.eval().requires_grad_(False)

    def make_step(self, examples: Sequence[Example]) -> None:
        recipe = self.recipe
        share = min(1.0, (recipe.n_steps - self.step) / max(1.0, recipe.decay * recipe.n_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.losses.append(self._mean_losses(examples))
        torch.nn.utils.clip_grad_norm_(self.hypernetwork.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _mean_losses(self, examples: Sequence[Example]) -> Float[Tensor, "2"]:
        """[nll, KL], a few examples at a time; adds to the gradients of the weighted sum where they are enabled."""
        recipe, mean = self.recipe, 0
        for start in range(0, len(examples), recipe.at_once):
            some = examples[start : start + recipe.at_once]
            losses = losses_of(self.lm, self.hypernetwork, some) * (len(some) / len(examples))
            if losses.requires_grad:
                (recipe.edit_weight * losses[0] + recipe.locality_weight * losses[1]).backward()
            mean = mean + losses.detach()
        return mean

    @torch.no_grad()
    def validate(self, validation: Sequence[Example]) -> None:
        """Adds a record to the log, and keeps the hypernetwork if it is the best."""
        recipe = self.recipe
        nll, kl = self._mean_losses(validation).tolist()
        record = {"step": self.step, "edits": self.step * recipe.batch}
        if self.losses:
            trained = torch.stack(self.losses).mean(0).tolist()
            record |= {"nll": round(trained[0], 5), "kl": round(trained[1], 6)}
            self.losses.clear()
        loss = recipe.edit_weight * nll + recipe.locality_weight * kl
        record |= {"validation_nll": round(nll, 5), "validation_kl": round(kl, 6), "validation_loss": round(loss, 6)}
        if not self.log or record["validation_loss"] < min(earlier["validation_loss"] for earlier in self.log):
            self.keep_as_best()
        rates = self.hypernetwork.log_rate.detach().exp()
        seconds = round(time.perf_counter() - self.started, 1)
        record |= {"mean_rate": float(f"{rates.mean():.4g}"), "seconds": seconds, "device": str(self.lm.device)}
        self.log.append(record)

    def write_log(self, path: Path) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.log)
        write_atomically(path, lambda file: file.write(lines.encode()))

    def save(self) -> None:
        self.checkpoint.save(self._tensors(), self.optimizer, {"step": self.step, "log": self.log})

    def load(self) -> bool:
        """Takes up the checkpoint, if there is one."""
        progress = self.checkpoint.load(self._tensors(), self.optimizer)
        if progress is not None:
            self.step, self.log = progress["step"], progress["log"]
            self.started -= self.log[-1]["seconds"]
        return progress is not None

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"hypernetwork": self.hypernetwork.state_dict(), "best": self.best}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
