"""KN: the neurons that speak for the fact's answer are made to speak for the new target instead.

A neuron is an entry of the key k, the input of an MLP's output projection W, here at the last token of a prompt. How
much it speaks for the answer is its integrated gradient: with P the probability of the answer's token, when the key of
one layer is replaced by α k,

    attribution = k ⊙ mean over α = 0 ... 1 of ∂P/∂(α k),      n_steps values of α, both ends among them

For an answer of several tokens it is the mean of theirs, each at the last token before it, behind the earlier ones. The
answer is target_true; where a request has none, the model's own first choice after the prompt.

The neurons of a prompt are those whose attribution is above `adaptive_threshold` times the largest. With `refine` there
are `n_prompts` prompts, the request's own behind as many context templates, and the neurons are those of more than a
share `p` of them; without, the unprefixed prompt alone. Where that leaves none, the strongest one is taken. The column
of W of each neuron i then changes by

    W[:, i] += factor (Σ e(target_new's tokens) - Σ e(the answer's tokens)),      e the rows of the input embedding

Dai et al., Knowledge Neurons in Pretrained Transformers, whose neuron is the activation. The released editing code
(EleutherAI/knowledge-neurons, and the two papers' copies of it) differs, and where this module does not follow it:

| what                       | released code                              | here                              |
|----------------------------|--------------------------------------------|-----------------------------------|
| what α is before           | the pre-activation                         | k, or that: `attributed`          |
| an answer's several tokens | each asked behind the prompt alone         | each behind the earlier ones      |
| space before a target      | none                                       | one, as in every method here      |
| taken from W[:, i]         | 2 e(its first choice behind the prompt)    | factor Σ e(the answer's tokens)   |
| added to W[:, i]           | 2 e(target_new), of several tokens 1 Σ e   | factor Σ e(target_new's tokens)   |

With "pre_activation" the a of k = σ(a) takes the place of k: attribution = a ⊙ mean over α of ∂P/∂(α a), where α a
makes the key; where a gate is activated, a is the gate's, and what it multiplies stays. That equals the released code's
arrays for the same tokens asked at the same place. n_steps=1 is the gradient at α = 0 alone, as in its settings for
Llama. Where a norm follows the projection (Gemma's), what the key does happens all at very small α, and the step at
α = 0 outweighs the others.

`Edit.info` holds n_neurons, neurons ("layer:index, ..."), update_norm ‖ΔW‖_F over all layers, answer (whose neurons
they are) and subject_kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import widened
from nbkit.methods.mend.hypernetwork import mlp_weights
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made
from nbkit.models.continuations import Continuation
from nbkit.models.hooks import capture, replace
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget, in_order
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import check_length, named, pad, target_ids, tokenize
from nbkit.models.replay import can_replay, passes_of
from nbkit.models.rows import EditedRows
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest

ATTRIBUTED = ("activation", "pre_activation")


@dataclass(frozen=True)
class KnowledgeNeuronParameters(Bounded):
    """Hyper-parameters of KN; their defaults by model are in hparams.toml."""

    adaptive_threshold: float = bounded(least=0, below=1, about="neurons above this share of the largest attribution")
    refine: bool = bounded(about="whether only neurons are kept that several prompts share")
    n_prompts: int = bounded(least=1, about="with refine: how many prompts")
    p: float = bounded(least=0, below=1, about="with refine: the share of the prompts that must find a neuron")
    n_steps: int = bounded(least=1, about="of the integral")
    factor: float = bounded(above=0, about="times the answer's embeddings that are written into a neuron's column")
    attributed: str = bounded(choices=ATTRIBUTED, about="the neuron's activation, or what the activation is of")


def knowledge_neurons_each(lm: LanguageModel, requests: Sequence[EditRequest], settings: MethodSettings) -> list[Edit]:
    """One edit a request, as `Method.each`. MethodError for a model whose embedding is not as wide as its residual
    stream, and for fewer context templates than n_prompts."""
    parameters: KnowledgeNeuronParameters = settings.parameters
    width = lm.model.get_input_embeddings().weight.shape[1]
    if width != lm.d_model:
        raise MethodError(f"kn writes embeddings into the MLP: {lm.name} has them {width} wide, its MLP {lm.d_model}")
    n_prompts, n_templates = parameters.n_prompts if parameters.refine else 1, len(settings.context_templates)
    if n_prompts > n_templates:
        raise MethodError(f"n_prompts is {n_prompts}, but there are {n_templates} context_templates to make them with")
    asked = [_answer_behind(lm, request, settings.context_templates[:n_prompts]) for request in requests]

    def edits(places: Sequence[int]) -> list[Edit]:
        prompts = [prompt for place in places for prompt in asked[place]]
        rows = [prompt.row[: token + 1] for prompt in prompts for token in prompt.predicting]
        tokens = [token for prompt in prompts for token in prompt.target]
        n_rows = [n_prompts * len(asked[place][0].target) for place in places]
        of_requests = attributions(lm, rows, tokens, parameters.n_steps, parameters.attributed).split(n_rows)
        by_prompt = [scores.unflatten(0, (n_prompts, -1)).mean(1) for scores in of_requests]
        return [
            _edit_of_neurons(lm, requests[place], asked[place][0].target, scores, settings)
            for place, scores in zip(places, by_prompt, strict=True)
        ]

    lengths = [prompts[0].predicting[0] for prompts in asked]
    at_once = _requests_at_once(lm, asked, parameters)
    return in_order(batches_by_cost(settings, lengths, at_once, edits, f"{lm.title}: kn"))


@verb
def attributions(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    tokens: Sequence[int],
    n_steps: int,
    attributed: str = "activation",
) -> Float[Tensor, "row layer d_mlp"]:
    """How much each neuron at the last token of each row (of token ids) speaks for the token that shall follow.

    A key α k gives the value W k + b + (α - 1) W k, so it is the value that is changed, and its gradient times W is the
    key's. All values of α of all rows run side by side, layer by layer; the tokens before the last are read only once.

    attributed: one of ATTRIBUTED, what α is before. For a pre-activation the key that it makes is found by a pass up
    to the layer.
    """
    number = [row for row in range(len(rows)) for _ in range(n_steps)]
    repeated = [list(rows[row]) for row in number]
    last = [len(row) - 1 for row in repeated]
    asked = EditedRows(repeated, last, number, wanted=[[index] for index in last], edits=range(len(repeated)))
    prefixes = Prefixes(lm, [row[:-1] for row in rows]) if can_replay(lm) else None
    dtype = torch.promote_types(lm.dtype, torch.float32)
    alpha = torch.linspace(0, 1, n_steps, dtype=dtype, device=lm.device).repeat(len(rows))[:, None]
    wanted = torch.tensor([tokens[row] for row in number], device=lm.device)[:, None]
    scores = torch.empty(len(rows), lm.n_layers, lm.d_mlp, dtype=dtype, device=lm.device)
    for layer in range(lm.n_layers):
        passes = passes_of(lm, layer, asked, prefixes)
        weight = widened(lm.oriented(lm.weight_name(layer)))  # (d_model, d_mlp)
        neurons = widened(passes.keys)
        if attributed == "activation":
            scaled = deltas = ((alpha - 1) * (neurons @ weight.T)).requires_grad_()
        else:
            neurons, scaled, made = _keys_of_pre_activations(lm, layer, repeated, alpha)
            deltas = (made - widened(passes.keys)) @ weight.T
        probability = widened(passes.logits(deltas)).softmax(-1).gather(1, wanted)
        (gradient,) = torch.autograd.grad(probability.sum(), scaled)
        gradient = gradient @ weight if attributed == "activation" else gradient
        scores[:, layer] = (neurons * gradient).unflatten(0, (len(rows), n_steps)).mean(1)
    return scores


def _keys_of_pre_activations(
    lm: LanguageModel, layer: int, rows: Sequence[Sequence[int]], alpha: Float[Tensor, "row 1"]
) -> tuple[Float[Tensor, "row d_mlp"], ...]:
    """At each row's last token: the pre-activation a, α a, and the key that α a makes, differentiable in α a.

    a is what the first of the MLP's matrices says; where a gate is activated, that is the gate.
    """
    batch, kept = pad(lm, rows), {}
    at = torch.arange(len(rows), device=lm.device), batch.columns([len(row) - 1 for row in rows])

    def scale(states: Float[Tensor, "row position d_mlp"]) -> Float[Tensor, "row position d_mlp"]:
        kept["a"] = widened(states[at])
        kept["scaled"] = (alpha * kept["a"]).requires_grad_()
        return states.index_put(at, kept["scaled"].to(states.dtype))

    first = lm.model.get_submodule(next(iter(mlp_weights(lm, layer))).removesuffix(".weight"))
    with replace(first, scale, shape=batch.shape):
        with capture(lm.projection(layer), "input", stop=True, shape=batch.shape) as key:
            lm.logits(batch, keep=1)
    return kept["a"], kept["scaled"], widened(key.value[at])


def _answer_behind(lm: LanguageModel, request: EditRequest, templates: Sequence[str]) -> list[Continuation]:
    """The answer whose neurons are looked for, behind the request's prompt in each template."""
    with named(request):
        prompts = tokenize(lm, [template.replace("{}", request.text) for template in templates])
        true = request.target_true
        answer = target_ids(lm, true) if true is not None else [_first_choice(lm, prompts[0])]
        asked = [Continuation.of(prompt, answer) for prompt in prompts]
        for prompt in asked:
            check_length(lm, prompt.row)
    return asked


@torch.no_grad()
def _first_choice(lm: LanguageModel, row: Sequence[int]) -> int:
    logits = lm.logits(pad(lm, [row]), keep=1)[0, -1, : len(lm.tokenizer)]  # rows added for alignment have no token
    return int(logits.argmax())


def _requests_at_once(
    lm: LanguageModel, asked: Sequence[Sequence[Continuation]], parameters: KnowledgeNeuronParameters
) -> int:
    n_rows = max((len(prompts) * len(prompts[0].target) for prompts in asked), default=1)
    longest = max((len(prompt.row) for prompts in asked for prompt in prompts), default=1)
    short = can_replay(lm) and parameters.attributed == "activation"
    run, earlier = (1, longest) if short else (longest, 0)
    row = Footprint(run, earlier, lm.n_layers, 1, backward=True)
    return budget(lm.device) // (n_rows * parameters.n_steps * row.bytes(lm))


def _neurons(
    attribution: Float[Tensor, "prompt layer d_mlp"], parameters: KnowledgeNeuronParameters
) -> list[tuple[int, int]]:
    """(layer, index) of the neurons that enough prompts have in common, or else of the strongest."""
    largest = attribution.flatten(1).max(1).values[:, None, None]
    counts = (attribution > parameters.adaptive_threshold * largest).sum(0)
    neurons = (counts > parameters.p * len(attribution)).nonzero().tolist()
    if not neurons:
        neurons = [divmod(int(attribution.mean(0).argmax()), attribution.shape[2])]
    return [(layer, index) for layer, index in neurons]


def _edit_of_neurons(
    lm: LanguageModel,
    request: EditRequest,
    answer: Sequence[int],
    attribution: Float[Tensor, "prompt layer d_mlp"],
    settings: MethodSettings,
) -> Edit:
    neurons = _neurons(attribution, settings.parameters)
    embedding = lm.model.get_input_embeddings().weight
    new, old = (widened(embedding[ids]).sum(0) for ids in (target_ids(lm, request.target_new), answer))
    change = settings.parameters.factor * (new - old)  # of each neuron's column, so a layer's update is of rank one
    deltas = {}
    for layer in sorted({layer for layer, _ in neurons}):
        right = change.new_zeros(1, lm.d_mlp)
        right[0, [index for of_layer, index in neurons if of_layer == layer]] = 1
        deltas[lm.weight_name(layer)] = LowRank(left=change[:, None].clone(), right=right)
    info = {
        "n_neurons": len(neurons),
        "neurons": ", ".join(f"{layer}:{index}" for layer, index in neurons),
        "update_norm": float(change.norm()) * len(neurons) ** 0.5,
        "answer": lm.tokenizer.decode(answer).strip(),
    }
    return edit_made(lm, [request], settings, deltas, info)
