"""Trains MEND's hypernetwork for one model: edit, ask, and follow the gradient through the edit into the hypernetwork.

    hypernetwork = train(lm, requests, texts, MendRecipe(), Path("runs/mend/miniworld-gpt2"))
    save_hypernetwork(weights_path(lm.name), hypernetwork, lm)

Of every request drawn, an edit of the unedited model is made, and the edited model is asked

1. for the target, on the request's prompt or one of its paraphrases: the target's negative log-likelihood;
2. for what should not change: KL(p_unedited ‖ p_edited) on a text, at every token, and at the end of another prompt:
   the request's own neighbour where it has some, else another request's prompt: any, or one of the same relation or
   about the same subject.

loss = edit_weight · 1 + locality_weight · 2. Mitchell et al., Fast Model Editing at Scale, section 3.3. The model does
not change, so the mean and std that g normalises by are measured once, before the training.

Resumable without stored generators: step n draws its examples from a generator seeded with (seed, n). What the
hypernetwork was at its best on requests that are held out is what the training returns.
"""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from nbkit import paths
from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError, RequestError, ResultsError
from nbkit.keys.extract import widened
from nbkit.methods.mend import (
    STD_FLOOR,
    Continuation,
    Hypernetwork,
    TokenGradients,
    continuations,
    mlp_weights,
    save_hypernetwork,
    target_nlls,
    token_gradients,
    weights_path,
)
from nbkit.models.edited import Changes
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import embedded_models
from nbkit.models.prompts import pad, tokenize
from nbkit.models.rows import marked
from nbkit.records.files import write_atomically
from nbkit.records.requests import EditRequest, read_requests, read_texts

LOG = "training_log.jsonl"
WORLD = ("miniworld/facts.json", "miniworld-training", "miniworld")  # the embedded models': data, texts, held out


@dataclass(frozen=True)
class MendRecipe:
    """The defaults are the embedded model's."""

    n_last_layers: int = 3  # whose MLPs are edited
    rank: int = 128  # of g's steps
    n_hidden: int = 1  # steps of g with a ReLU; there is one more without
    first_rate: float = 1e-4  # α at the start
    n_steps: int = 3_000
    batch: int = 10  # edits a step, each of the unedited model
    at_once: int = 10  # edits in one pass: fewer take less memory and give the same
    learning_rate: float = 1e-3  # of Adam, on g
    rate_learning_rate: float = 1e-2  # of Adam, on log α
    decay: float = 0.5  # share of the steps, at the end, over which both fall to zero
    edit_weight: float = 0.1
    locality_weight: float = 1.0
    grad_clip: float = 100.0  # the gradient's largest norm
    text_tokens: int = 32  # a text is cut to so many
    n_normalising: int = 500  # requests whose tokens give mean and std
    n_validation: int = 100  # requests held out, to choose the best by
    validate_every: int = 250  # steps, after which there is a checkpoint too
    seed: int = 0

    def __post_init__(self):
        for name, least in (
            ("n_last_layers", 1), ("rank", 1), ("n_hidden", 0), ("n_steps", 1), ("batch", 1), ("at_once", 1),
            ("text_tokens", 1), ("n_normalising", 1), ("n_validation", 1), ("validate_every", 1),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                raise MethodError(f"{name} must be {least} or above, not {getattr(self, name)}")
        for name in ("first_rate", "learning_rate", "rate_learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise MethodError(f"{name} must be above 0, not {getattr(self, name)}")


PUBLISHED = MendRecipe(rank=1920, n_steps=100_000, learning_rate=1e-6, at_once=1, validate_every=1_000)
"""What the papers' models were trained with; the decay, and α's logarithm and its rate, are this project's."""


# --- what is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One edit and what is asked of the edited model, as rows of tokens."""

    edited: Continuation
    asked: Continuation
    unchanged: list[tuple[list[int], range]]  # rows, and the tokens of each whose next-token probabilities shall stay


class Examples:
    """Draws examples from requests and texts."""

    def __init__(self, lm: LanguageModel, requests: Sequence[EditRequest], texts: Sequence[str], text_tokens: int):
        self.lm, self.requests, self.texts, self.text_tokens = lm, list(requests), list(texts), text_tokens
        self.pools: list[dict[str | None, list[EditRequest]]] = [defaultdict(list), defaultdict(list)]
        for request in self.requests:
            for pool, of in zip(self.pools, (request.relation_id, request.subject), strict=True):
                pool[of].append(request)

    def draw(self, n: int, rng: np.random.Generator) -> list[Example]:
        """n examples of different requests (of all, where there are fewer)."""
        chosen = rng.choice(len(self.requests), min(n, len(self.requests)), replace=False)
        return [self.example(self.requests[number], rng) for number in chosen]

    def example(self, request: EditRequest, rng: np.random.Generator) -> Example:
        asked = _one([request.text, *request.paraphrase_prompts], rng)
        edited, asked = continuations(self.lm, [request.text, asked], [request.target_new] * 2)
        unchanged = [self._elsewhere(request, rng)]
        if self.texts:
            (row,) = tokenize(self.lm, [_one(self.texts, rng)])
            row = row[: self.text_tokens]
            unchanged.append((row, range(len(row))))
        return Example(edited, asked, unchanged)

    def _elsewhere(self, request: EditRequest, rng: np.random.Generator) -> tuple[list[int], range]:
        if request.neighborhood_targets:
            number = rng.integers(len(request.neighborhood_prompts))
            texts, targets = request.neighborhood_prompts[number], request.neighborhood_targets[number]
            (neighbor,) = continuations(self.lm, [texts], [targets])
            return neighbor.row, neighbor.predicting
        kind = rng.integers(3)
        pool = self.requests if kind == 2 else self.pools[kind][(request.relation_id, request.subject)[kind]]
        others = pool if len(pool) > 1 else self.requests
        other = _one(others, rng)
        while other is request and len(others) > 1:
            other = _one(others, rng)
        (row,) = tokenize(self.lm, [other.text])
        return row, range(len(row) - 1, len(row))


def _one(items: Sequence, rng: np.random.Generator):
    return items[rng.integers(len(items))]


def not_among(requests: Sequence[EditRequest], held_out: Sequence[EditRequest]) -> list[EditRequest]:
    """Those of `requests` that are not about a fact of `held_out`: neither by subject and relation nor by a prompt."""
    taken = {mark for request in held_out for mark in _marks(request)}
    return [request for request in requests if taken.isdisjoint(_marks(request))]


def _marks(request: EditRequest) -> Iterator[object]:
    yield request.text
    yield from request.paraphrase_prompts
    if request.relation_id is not None:
        yield request.subject, request.relation_id


# --- the loss ---------------------------------------------------------------------------------------------------------


def losses_of(lm: LanguageModel, hypernetwork: Hypernetwork, examples: Sequence[Example]) -> Float[Tensor, "2"]:
    """[the target's nll, KL(p_unedited ‖ p_edited)], each the mean over the examples, through their edits."""
    found = token_gradients(lm, [example.edited for example in examples], hypernetwork.modules_edited)
    changes = changes_of(lm, hypernetwork, found)
    with changes.added(lm, hypernetwork.modules_edited):
        asked = [example.asked for example in examples]
        nll = target_nlls(lm, pad(lm, [one.row for one in asked]), asked)

    rows, kept = zip(*(part for example in examples for part in example.unchanged), strict=True)
    batch = pad(lm, rows)
    keep = marked(kept, batch.shape[1], lm.device)
    with torch.no_grad():
        before = widened(lm.logits(batch, keep=keep)).log_softmax(-1)  # (token, vocabulary)
    with changes.added(lm, hypernetwork.modules_edited):
        after = widened(lm.logits(batch, keep=keep)).log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1)
    shares = torch.tensor([1 / (len(rows) * len(tokens)) for tokens in kept for _ in tokens], device=lm.device)
    return torch.stack([nll.mean(), (shares.to(divergence.dtype) * divergence).sum()])


def changes_of(lm: LanguageModel, hypernetwork: Hypernetwork, found: TokenGradients) -> Changes:
    """The edit of each row of `found`, for rows of a pass that come edit by edit; with gradients."""
    factors = list(hypernetwork.factors(found))
    edits = [
        Edit({name: LowRank(left[row], right[row]) for name, left, right in factors}) for row in range(len(found.nll))
    ]
    return Changes(lm, edits)


def normalise(
    lm: LanguageModel, hypernetwork: Hypernetwork, requests: Sequence[EditRequest], at_once: int
) -> None:
    """Sets mean and std of every g to those of [u; δ] over the tokens that give to the gradients of these requests."""
    sums: dict[int, list[Tensor]] = {}
    for start in range(0, len(requests), at_once):
        some = requests[start : start + at_once]
        asked = continuations(lm, [request.text for request in some], [request.target_new for request in some])
        found = token_gradients(lm, asked, hypernetwork.modules_edited)
        for name in hypernetwork.shapes:
            gives = found.gives[name]
            x = torch.cat([found.u[name][gives], found.delta[name][gives]], -1).double()
            new = [torch.tensor(float(len(x))), x.sum(0), x.square().sum(0)]
            transform = hypernetwork.transform_of(name)
            old = sums.get(id(transform))
            sums[id(transform)] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    with torch.no_grad():
        for transform in hypernetwork.transforms.values():
            n, total, squares = sums[id(transform)]
            mean = total / n
            std = (squares / n - mean.square()).clamp(min=0).sqrt()
            parts = [part.clamp(min=STD_FLOOR * float(part.mean())) for part in std.split(transform.sizes)]
            transform.mean.copy_(mean)
            transform.std.copy_(torch.cat(parts))


# --- the training -----------------------------------------------------------------------------------------------------


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
    for a checkpoint that is damaged, or of another recipe, model, or data.
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
    run = _Run(lm, recipe, folder / "checkpoint.safetensors", _digest(requests, texts))
    if not run.load():
        normalise(lm, run.hypernetwork, used[: recipe.n_normalising], recipe.at_once)
        run.validate(validation)
    bar = tqdm(
        range(run.step, recipe.n_steps), initial=run.step, total=recipe.n_steps, desc="mend", mininterval=5,
        disable=not progress,
    )  # fmt: skip
    for step in bar:
        run.make_step(examples.draw(recipe.batch, np.random.default_rng([recipe.seed, 2, step])))
        if run.step % recipe.validate_every == 0 or run.step == recipe.n_steps:
            run.validate(validation)
            run.save()
            _write_log(folder / LOG, run.log)
            bar.set_postfix(validation=f"{run.log[-1]['validation_loss']:.4f}")
    _write_log(folder / LOG, run.log)
    return run.best_hypernetwork()


def train_to_file(
    lm: LanguageModel,
    data: Path | None = None,
    texts: Path | None = None,
    held_out: Path | None = None,
    out: Path | None = None,
    work: Path | None = None,
    changes: Mapping[str, object] | None = None,
) -> Path:
    """Trains by the model's recipe, with `changes`, on requests read from files; returns the file written.

    None: for an embedded model the files of its world, whose edit requests are held out; `out` where edits look for it
    (`weights_path`), with the log beside it; `work`, for checkpoint and log, below runs/mend. RequestError where there
    is nothing to train on.
    """
    embedded = lm.name in embedded_models()
    if data is None and not embedded:
        raise RequestError(f"{lm.name} is no embedded model: give it a file of requests to train on (--data FILE)")
    if data is None:
        data, texts, held_out = paths.DATA / WORLD[0], texts or WORLD[1], held_out or WORLD[2]
    requests = not_among(read_requests(data), read_requests(held_out) if held_out else [])
    recipe = replace(MendRecipe() if embedded else PUBLISHED, **(changes or {}))
    out = out or weights_path(lm.name)
    work = work or paths.RUNS / "mend" / weights_path(lm.name).parent.name
    hypernetwork = train(lm, requests, read_texts(texts) if texts else [], recipe, work)
    save_hypernetwork(out, hypernetwork, lm, asdict(recipe))
    log = (work / LOG).read_bytes()
    write_atomically(out.with_name("mend_training_log.jsonl"), lambda file: file.write(log))
    return out


class _Run:
    """State of one training: hypernetwork, optimiser, the best so far, log; and the file that it is kept in."""

    def __init__(self, lm: LanguageModel, recipe: MendRecipe, path: Path, data: str):
        self.lm, self.recipe, self.path = lm, recipe, path
        layers = range(max(0, lm.n_layers - recipe.n_last_layers), lm.n_layers)
        self.shapes = {name: shape for layer in layers for name, shape in mlp_weights(lm, layer).items()}
        self.about = {"recipe": json.dumps(asdict(recipe)), "model": lm.base_hash, "data": data}
        self.dtype = torch.promote_types(lm.dtype, torch.float32)
        self.hypernetwork = self._new()
        transforms = list(self.hypernetwork.transforms.parameters())
        groups = [{"params": transforms}, {"params": [self.hypernetwork.log_rate]}]
        self.optimizer = torch.optim.Adam(groups, lr=recipe.learning_rate)
        self.step = 0
        self.log: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # of the steps since the last record
        self.started = time.perf_counter()

    def _new(self) -> Hypernetwork:
        recipe, generator = self.recipe, torch.Generator().manual_seed(self.recipe.seed)
        new = Hypernetwork(self.shapes, recipe.rank, recipe.n_hidden, recipe.first_rate, generator)
        return new.to(self.lm.device, self.dtype)

    def best_hypernetwork(self) -> Hypernetwork:
        best = self._new().eval().requires_grad_(False)
        best.load_state_dict(self.best)
        return best

    def make_step(self, examples: Sequence[Example]) -> None:
        recipe = self.recipe
        share = min(1.0, (recipe.n_steps - self.step) / max(1.0, recipe.decay * recipe.n_steps))
        for group, rate in zip(
            self.optimizer.param_groups, (recipe.learning_rate, recipe.rate_learning_rate), strict=True
        ):
            group["lr"] = rate * share
        self.losses.append(sum(self._losses(examples, lambda loss: loss.backward())))
        torch.nn.utils.clip_grad_norm_(self.hypernetwork.parameters(), recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _losses(
        self, examples: Sequence[Example], follow: Callable[[Tensor], object] = lambda loss: None
    ) -> Iterator[Float[Tensor, "2"]]:
        """[nll, KL] of a few examples at a time, times their share of all; `follow` gets that share of the loss."""
        recipe = self.recipe
        for start in range(0, len(examples), recipe.at_once):
            some = examples[start : start + recipe.at_once]
            losses = losses_of(self.lm, self.hypernetwork, some) * (len(some) / len(examples))
            follow(recipe.edit_weight * losses[0] + recipe.locality_weight * losses[1])
            yield losses.detach()

    def validate(self, validation: Sequence[Example]) -> None:
        """Adds a record to the log, and keeps the hypernetwork if it is the best."""
        recipe = self.recipe
        with torch.no_grad():
            nll, kl = sum(self._losses(validation)).tolist()
        record = {"step": self.step, "edits": self.step * recipe.batch}
        if self.losses:
            trained = torch.stack(self.losses).mean(0).tolist()
            record |= {"nll": round(trained[0], 5), "kl": round(trained[1], 6)}
            self.losses.clear()
        loss = recipe.edit_weight * nll + recipe.locality_weight * kl
        record |= {"validation_nll": round(nll, 5), "validation_kl": round(kl, 6), "validation_loss": round(loss, 6)}
        if not self.log or record["validation_loss"] < min(earlier["validation_loss"] for earlier in self.log):
            state = self.hypernetwork.state_dict()
            self.best = {name: tensor.detach().clone() for name, tensor in state.items()}
        rates = self.hypernetwork.log_rate.detach().exp()
        record |= {"mean_rate": float(f"{rates.mean():.4g}"), "seconds": round(time.perf_counter() - self.started, 1)}
        self.log.append(record)

    def save(self) -> None:
        """Replaces the last checkpoint, whole or not at all."""
        tensors = {f"hypernetwork.{name}": tensor for name, tensor in self.hypernetwork.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {**self.about, "step": str(self.step), "log": json.dumps(self.log)}
        write_atomically(self.path, lambda file: file.write(save(tensors, metadata)))

    def load(self) -> bool:
        """Takes up the checkpoint, if there is one. ResultsError, before anything changes, if it cannot be."""
        if not self.path.exists():
            return False
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(self.path)
        except SafetensorError as error:
            raise ResultsError(f"{self.path} is damaged ({error}); delete it to train from the start") from error
        changed = [name for name, value in self.about.items() if metadata.get(name) != value]
        if changed:
            raise ResultsError(
                f"{self.path} is of another training (of other {', '.join(changed)}); delete it, or train elsewhere"
            )
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts[part][name] = tensor
        self.hypernetwork.load_state_dict(parts["hypernetwork"])
        self.best = {name: tensor.to(self.lm.device) for name, tensor in parts["best"].items()}
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in parts["optimizer"].items():
            index, name = key.split(".", 1)
            state[int(index)][name] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": dict(state)})
        self.step, self.log = int(metadata["step"]), json.loads(metadata["log"])
        return True


def _digest(requests: Sequence[EditRequest], texts: Sequence[str]) -> str:
    """Of all that examples are drawn from."""
    digest = hashlib.sha256(json.dumps(list(texts)).encode())
    digest.update(json.dumps([asdict(request) for request in requests], sort_keys=True).encode())
    return digest.hexdigest()


def _write_log(path: Path, log: Sequence[Mapping[str, float]]) -> None:
    write_atomically(path, lambda file: file.write("".join(json.dumps(record) + "\n" for record in log).encode()))
