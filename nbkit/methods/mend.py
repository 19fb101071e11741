"""MEND: a small trained network turns the gradient of the wish into an edit of the last layers' MLP matrices.

The gradient of the target's negative log-likelihood with respect to one weight W is a sum over the tokens t read,

    ∂L/∂W = Σ_t δ_t u_tᵀ        u_t: the module's input, (d_in), δ_t: the gradient at its output, (d_out)

so a network g on vectors of d_in + d_out numbers can stand for one on matrices:

    [ũ; δ̃] = g([u; δ]),    ΔW = -α Σ_t δ̃_t ũ_tᵀ

g first normalises, z = ([u; δ] - mean) / std with the statistics of training, number by number, and then adds low-rank
steps, z ← z + σ(s ⊙ (U V z + b) + o): σ is the ReLU in the hidden ones, and nothing in the last. U, b and o start at
zero, so g starts as the normalisation alone. Weights of one shape share one g (U, V, b, mean, std) but have their own
scale s, shift o and edit rate α. A token at which the loss has no gradient (δ = 0: in the last layer all those before
the target) gives nothing.

Edited are all matrices of the MLP (input, gate and output projections) in the last layers, three as published. Mitchell
et al., Fast Model Editing at Scale, section 3. Who trains g: `nbkit.mend_training`, `python -m nbkit train-mend`.

`Edit.info` holds update_norm (Frobenius, over all weights), losses ([[nll]], before the edit), target_probability
(before the edit: geometric mean over the target's tokens), n_tokens (read) and subject_kind; of a batch the means over
its requests, the sum of the tokens, and subject_kind as a list.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nbkit import paths
from nbkit.edits.edit import Edit
from nbkit.edits.updates import Dense, LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import widened
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made, in_order
from nbkit.models.edited import layer_of
from nbkit.models.hooks import capture, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.loading import embedded_models
from nbkit.models.memory import Footprint, budget
from nbkit.models.prompts import check_length, named, pad, subject_kind, target_ids, tokenize
from nbkit.models.rows import Batch, marked
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.files import write_atomically
from nbkit.records.requests import EditRequest

FILE = "mend.safetensors"
FORMAT = "nbkit mend 1"
STD_FLOOR = 1e-3  # of the mean standard deviation: what a number that hardly ever changed is divided by


@dataclass(frozen=True)
class MendParameters(Bounded):
    """What can be set when editing; all else was when the hypernetwork was trained."""

    weights: str  # file of the trained hypernetwork; "": where `train-mend` puts it
    lr_scale: float = bounded(above=0)  # times every edit rate α


# --- the hypernetwork -------------------------------------------------------------------------------------------------


class Transform(nn.Module):
    """g of all edited weights of one shape."""

    def __init__(
        self, d_in: int, d_out: int, n_weights: int, rank: int, n_hidden: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        d, n_steps = d_in + d_out, n_hidden + 1
        rank = min(rank, d)
        self.sizes = [d_in, d_out]
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("std", torch.ones(d))
        self.V = nn.Parameter(torch.empty(n_steps, d, rank))
        for step in self.V.data:
            nn.init.xavier_uniform_(step, generator=generator)
        self.U = nn.Parameter(torch.zeros(n_steps, rank, d))
        self.b = nn.Parameter(torch.zeros(n_steps, d))
        self.s = nn.Parameter(torch.ones(n_steps, n_weights, d))
        self.o = nn.Parameter(torch.zeros(n_steps, n_weights, d))

    def forward(
        self, u: Float[Tensor, "*token d_in"], delta: Float[Tensor, "*token d_out"], place: int
    ) -> tuple[Float[Tensor, "*token d_in"], Float[Tensor, "*token d_out"]]:
        """ũ and δ̃ for the weight at `place` among those of this shape."""
        z = (torch.cat([u, delta], -1) - self.mean) / self.std
        for number in range(len(self.U)):
            low_rank = z @ self.V[number] @ self.U[number] + self.b[number]
            step = self.s[number, place] * low_rank + self.o[number, place]
            # Every step is zero at first, where relu has no gradient but clamp has.
            z = z + (step.clamp(min=0) if number < len(self.U) - 1 else step)
        u, delta = z.split(self.sizes, -1)
        return u, delta


class Hypernetwork(nn.Module):
    """MEND's network for some weights of one model: `shapes` is {weight name: (d_out, d_in)}."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        n_hidden: int = 1,
        first_rate: float = 1e-4,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.rank, self.n_hidden = rank, n_hidden
        alike: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.shapes.items():
            alike.setdefault(shape, []).append(name)
        self.place = {name: place for names in alike.values() for place, name in enumerate(names)}
        self.transforms = nn.ModuleDict(
            {_key(shape): Transform(*reversed(shape), len(names), rank, n_hidden, generator)
             for shape, names in alike.items()}
        )  # fmt: skip
        # Learned as a logarithm: it stays above 0, and a step changes it by the same share whatever its size.
        self.log_rate = nn.Parameter(torch.full((len(self.shapes),), math.log(first_rate)))

    @property
    def modules_edited(self) -> dict[str, int]:
        """Path of each edited module, and its d_out."""
        return {name.removesuffix(".weight"): shape[0] for name, shape in self.shapes.items()}

    def transform_of(self, name: str) -> Transform:
        return self.transforms[_key(self.shapes[name])]

    def factors(
        self, found: "TokenGradients", scale: float = 1.0
    ) -> Iterator[tuple[str, Float[Tensor, "row d_out position"], Float[Tensor, "row position d_in"]]]:
        """For each weight left and right, whose product is each row's ΔW; left is 0 at tokens that give nothing.

        scale: times every α.
        """
        for number, name in enumerate(self.shapes):
            u, delta = found.u[name], found.delta[name]
            u, delta = self.transform_of(name)(u, delta, self.place[name])
            rate = scale * self.log_rate[number].exp()
            left = torch.where(found.gives[name][..., None], -rate * delta, 0)
            yield name, left.mT, u


def _key(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def mlp_weights(lm: LanguageModel, layer: int) -> dict[str, tuple[int, int]]:
    """The MLP's matrices of a layer, {weight name: (d_out, d_in)}: those beside its output projection, and that."""
    lm.check_layer(layer)
    parent = lm.architecture.projection_path(layer).rpartition(".")[0]
    shapes = {}
    for name, module in lm.model.get_submodule(parent).named_children():
        if isinstance(module, nn.Linear | Conv1D):
            shape = tuple(module.weight.shape)
            shapes[f"{parent}.{name}.weight"] = shape[::-1] if lm.architecture.transposed else shape
    return shapes


# --- gradients, token by token ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """A text and what shall follow it. The target's last token is only ever predicted, never read."""

    row: list[int]
    target: list[int]

    @property
    def predicting(self) -> range:
        """The tokens of the row whose logits are of the target."""
        return range(len(self.row) - len(self.target), len(self.row))


def continuations(lm: LanguageModel, texts: Sequence[str], targets: Sequence[str]) -> list[Continuation]:
    """PromptError for an empty text or target, or one beyond the context."""
    found = []
    for text, row, target in zip(texts, tokenize(lm, texts), targets, strict=True):
        ids = target_ids(lm, target)
        found.append(Continuation([*row, *ids[:-1]], ids))
        check_length(lm, found[-1].row, text)
    return found


def target_nlls(lm: LanguageModel, batch: Batch, asked: Sequence[Continuation]) -> Float[Tensor, " row"]:
    """Mean negative log-likelihood of each row's target tokens, by a plain pass of the model as it is."""
    keep = marked([one.predicting for one in asked], batch.shape[1], lm.device)
    log_probabilities = widened(lm.logits(batch, keep=keep)).log_softmax(-1)  # (token, vocabulary)
    tokens = torch.tensor([token for one in asked for token in one.target], device=lm.device)
    rows = torch.tensor([row for row, one in enumerate(asked) for _ in one.target], device=lm.device)
    of_tokens = log_probabilities.gather(-1, tokens[:, None])[:, 0]
    sums = torch.zeros(len(asked), dtype=of_tokens.dtype, device=lm.device).index_add(0, rows, of_tokens)
    return -sums / torch.tensor([len(one.target) for one in asked], device=lm.device)


@dataclass(frozen=True)
class TokenGradients:
    """Of one pass over some rows, by weight: u and δ of each token, and which tokens give to the gradient."""

    u: dict[str, Float[Tensor, "row position d_in"]]
    delta: dict[str, Float[Tensor, "row position d_out"]]
    gives: dict[str, Bool[Tensor, "row position"]]
    nll: Float[Tensor, " row"]
    n_tokens: list[int]  # read, by row


def token_gradients(
    lm: LanguageModel, asked: Sequence[Continuation], modules: Mapping[str, int]
) -> TokenGradients:
    """Every row's gradient of its own loss, as u and δ at its tokens. modules: path and d_out of each.

    Reads δ off zeros added to each module's output; nothing in the model is changed.
    """
    batch = pad(lm, [one.row for one in asked])
    kept, probes = {}, {}
    with torch.enable_grad(), ExitStack() as stack:
        for path, d_out in modules.items():
            module = lm.model.get_submodule(path)
            probes[path] = torch.zeros(*batch.shape, d_out, dtype=lm.dtype, device=lm.device, requires_grad=True)
            kept[path] = stack.enter_context(capture(module, "input", shape=batch.shape))
            stack.enter_context(replace(module, lambda y, zero=probes[path]: y + zero, shape=batch.shape))
        nll = target_nlls(lm, batch, asked)
        gradients = torch.autograd.grad(nll.sum(), list(probes.values()))
    names = [f"{path}.weight" for path in modules]
    u = {name: widened(kept[path].value.detach()) for name, path in zip(names, modules, strict=True)}
    delta = {name: widened(gradient) for name, gradient in zip(names, gradients, strict=True)}
    read = batch.attention_mask.bool()
    gives = {name: read & (u[name] != 0).any(-1) & (delta[name] != 0).any(-1) for name in names}
    return TokenGradients(u, delta, gives, nll.detach(), batch.lengths.tolist())


# --- the method -------------------------------------------------------------------------------------------------------


def mend_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, all of the model as it is, which is not changed; many in one pass, each by its own tokens."""

    def edits(
        places: Sequence[int], gradients: TokenGradients, updates: Mapping[str, Sequence[LowRank]]
    ) -> Iterator[Edit]:
        nlls = gradients.nll.tolist()
        for row, place in enumerate(places):
            deltas = {name: of_rows[row] for name, of_rows in updates.items()}
            info = _info(deltas, nlls[row : row + 1], gradients.n_tokens[row])
            yield edit_made(lm, [requests[place]], settings, deltas, info)

    return in_order((places, list(edits(places, *made))) for places, *made in _passes(lm, requests, settings))


def mend_together(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> Edit:
    """One edit for all requests: the sum of what each would get alone, for g was trained on single requests.

    Low-rank as long as that takes fewer numbers than the matrix itself.
    """
    parameters: MendParameters = settings.parameters
    deltas: dict[str, LowRank | Dense] = {}
    nlls, n_tokens = [], 0
    for _, found, updates in _passes(lm, requests, settings):
        for name, of_rows in updates.items():
            for update in of_rows:
                deltas[name] = _plus(deltas[name], update) if name in deltas else update
        nlls += found.nll.tolist()
        n_tokens += sum(found.n_tokens)
    info = _info(deltas, nlls, n_tokens)
    info["subject_kind"] = [subject_kind(lm, request) for request in requests]
    return Edit(deltas, tuple(requests), "mend", asdict(parameters), info)


def _passes(
    lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings
) -> Iterator[tuple[list[int], TokenGradients, dict[str, list[LowRank]]]]:
    """Places of the requests of one pass, what it found, and the updates; those of like length share a pass."""
    parameters: MendParameters = settings.parameters
    hypernetwork = load_hypernetwork(lm, parameters.weights)
    asked = []
    for request in requests:
        with named(request):
            asked += continuations(lm, [request.text], [request.target_new])

    @torch.no_grad()
    def compute(places: Sequence[int]) -> tuple[TokenGradients, dict[str, list[LowRank]]]:
        found = token_gradients(lm, [asked[place] for place in places], hypernetwork.modules_edited)
        updates: dict[str, list[LowRank]] = {}
        for name, left, right in hypernetwork.factors(found, parameters.lr_scale):
            gives = found.gives[name]
            updates[name] = [
                LowRank(left[row][:, gives[row]].clone(), right[row][gives[row]].clone()) for row in range(len(places))
            ]
        return found, updates

    lengths = [len(one.row) for one in asked]
    for places, made in batches_by_cost(settings, lengths, _edits_at_once(lm, asked, hypernetwork), compute, "mend"):
        yield places, *made


def _edits_at_once(lm: LanguageModel, asked: Sequence[Continuation], hypernetwork: Hypernetwork) -> int:
    longest, n_logits = max((len(one.row) for one in asked), default=1), max((len(a.target) for a in asked), default=1)
    n_layers = lm.n_layers - min(layer_of(lm, name) for name in hypernetwork.shapes)  # that gradients go through
    return budget(lm.device) // Footprint(longest, 0, n_layers, n_logits, backward=True).bytes(lm)


def _info(deltas: Mapping[str, LowRank | Dense], nlls: Sequence[float], n_tokens: int) -> dict[str, object]:
    return {
        "update_norm": math.sqrt(sum(delta.norm() ** 2 for delta in deltas.values())),
        "losses": [[sum(nlls) / len(nlls)]],
        "target_probability": sum(math.exp(-nll) for nll in nlls) / len(nlls),
        "n_tokens": n_tokens,
    }


def _plus(a: LowRank | Dense, b: LowRank) -> LowRank | Dense:
    """a + b, low-rank as long as that takes fewer numbers than the matrix."""
    d_out, d_in = b.shape
    if isinstance(a, LowRank) and (a.left.shape[1] + b.left.shape[1]) * (d_out + d_in) <= d_out * d_in:
        return LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right]))
    return Dense(a.dense() + b.dense())


# --- the file ---------------------------------------------------------------------------------------------------------


def weights_path(model: str) -> Path:
    """Where the hypernetwork of a model is if nothing else is said: beside an embedded one, else below runs/."""
    if model in embedded_models():
        return paths.DATA / "models" / model / FILE
    return paths.RUNS / "mend" / model.strip("/").replace("/", "--") / FILE


def mend_files(lm: LanguageModel, parameters: MendParameters) -> list[Path]:
    """The hypernetwork's file."""
    return [Path(parameters.weights).expanduser() if parameters.weights else weights_path(lm.name)]


def save_hypernetwork(
    path: Path, hypernetwork: Hypernetwork, lm: LanguageModel, recipe: Mapping[str, object] | None = None
) -> None:
    """Writes the file whole or not at all. Its metadata say of which model and weights it is, and how it was made."""
    metadata = {
        "format": FORMAT,
        "model": lm.name,
        "hash": lm.base_hash,
        "dtype": str(lm.dtype),
        "shapes": json.dumps(hypernetwork.shapes),
        "rank": str(hypernetwork.rank),
        "n_hidden": str(hypernetwork.n_hidden),
        "recipe": json.dumps(dict(recipe or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in hypernetwork.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(save(tensors, metadata)))


def load_hypernetwork(lm: LanguageModel, weights: str = "") -> Hypernetwork:
    """The hypernetwork in the file `weights`, "" for the one at `weights_path`, on the model's device.

    MethodError, saying what to do, if there is none, or it is damaged or of another model: of other shapes, or of other
    weights, which can be told as long as the model has the number type that it was trained with.
    """
    path = Path(weights).expanduser() if weights else weights_path(lm.name)
    train = f"python -m nbkit train-mend --model {lm.name}"
    if not path.is_file():
        raise MethodError(f"mend has no trained hypernetwork for {lm.name} at {path}; train one with `{train}`")
    stat = path.stat()
    try:
        hypernetwork, metadata = _read(
            str(path), stat.st_mtime_ns, stat.st_size, lm.device, torch.promote_types(lm.dtype, torch.float32)
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise MethodError(f"{path} is damaged, or no hypernetwork ({error}); train one with `{train}`") from error
    problem = _mismatch(lm, hypernetwork, metadata)
    if problem:
        raise MethodError(f"{path} was trained for another model than {lm.name}: {problem}; train one with `{train}`")
    return hypernetwork


def _mismatch(lm: LanguageModel, hypernetwork: Hypernetwork, metadata: Mapping[str, str]) -> str | None:
    parameters = dict(lm.model.named_parameters())
    for name, shape in hypernetwork.shapes.items():
        if name not in parameters:
            return f"{metadata['model']} has {name}"
        found = tuple(parameters[name].shape)
        found = found[::-1] if lm.architecture.transposed else found
        if found != shape:
            return f"{name} is {found} here and {shape} in {metadata['model']} (d_out, d_in)"
        if parameters[name].is_meta:
            return f"{name} is offloaded (on the meta device) here"
    if metadata["dtype"] == str(lm.dtype) and metadata["hash"] != lm.base_hash:
        return f"{metadata['model']} had other weights when it was trained"
    return None


@lru_cache(maxsize=1)  # a sequence asks for the same file at every step
def _read(
    path: str, _mtime: int, _size: int, device: torch.device, dtype: torch.dtype
) -> tuple[Hypernetwork, dict[str, str]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    shapes = json.loads(metadata["shapes"])
    hypernetwork = Hypernetwork(shapes, int(metadata["rank"]), int(metadata["n_hidden"]))
    hypernetwork.load_state_dict(load_file(path))
    return hypernetwork.to(device, dtype).eval().requires_grad_(False), metadata
