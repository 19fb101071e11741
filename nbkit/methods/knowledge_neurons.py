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

Dai et al., Knowledge Neurons in Pretrained Transformers, as in the published editing code, apart from two things: that
appends the model's own choices to the prompt, not the answer's earlier tokens, and takes away those, not the answer.
n_steps=1 is the gradient at α = 0 alone, as in its settings for Llama. Where a norm follows the projection (Gemma's),
what the key does happens all at very small α, and the step at α = 0 outweighs the others.

`Edit.info` holds n_neurons, neurons ("layer:index, ..."), update_norm ‖ΔW‖_F over all layers, answer (whose neurons
they are) and subject_kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import LowRank
from nbkit.errors import MethodError
from nbkit.keys.extract import widened
from nbkit.methods.method import MethodSettings, batches_by_cost, edit_made, in_order
from nbkit.models.continuations import Continuation
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import Footprint, budget
from nbkit.models.prefixes import Prefixes
from nbkit.models.prompts import check_length, named, pad, target_ids, tokenize
from nbkit.models.replay import can_replay, passes_of
from nbkit.models.rows import EditedRows
from nbkit.records.bounds import Bounded, bounded
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class KnowledgeNeuronParameters(Bounded):
    """Hyper-parameters of KN; their defaults by model are in hparams.toml."""

    adaptive_threshold: float = bounded(least=0, below=1)
    refine: bool
    n_prompts: int = bounded(least=1)  # with refine
    p: float = bounded(least=0, below=1)  # with refine
    n_steps: int = bounded(least=1)  # of the integral
    factor: float = bounded(above=0)


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
        of_requests = attributions(lm, rows, tokens, parameters.n_steps).split(n_rows)
        by_prompt = [scores.unflatten(0, (n_prompts, -1)).mean(1) for scores in of_requests]
        return [
            _edit_of_neurons(lm, requests[place], asked[place][0].target, scores, settings)
            for place, scores in zip(places, by_prompt, strict=True)
        ]

    lengths = [prompts[0].predicting[0] for prompts in asked]
    return in_order(batches_by_cost(settings, lengths, _requests_at_once(lm, asked, parameters.n_steps), edits, "kn"))


def attributions(
    lm: LanguageModel, rows: Sequence[Sequence[int]], tokens: Sequence[int], n_steps: int
) -> Float[Tensor, "row layer d_mlp"]:
    """How much each neuron at the last token of each row (of token ids) speaks for the token that shall follow.

    A key α k gives the value W k + b + (α - 1) W k, so it is the value that is changed, and its gradient times W is the
    key's. All values of α of all rows run side by side, layer by layer; the tokens before the last are read only once.
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
        keys = widened(passes.keys)
        deltas = ((alpha - 1) * (keys @ weight.T)).requires_grad_()
        probability = widened(passes.logits(deltas)).softmax(-1).gather(1, wanted)
        (gradient,) = torch.autograd.grad(probability.sum(), deltas)
        scores[:, layer] = (keys * (gradient @ weight)).unflatten(0, (len(rows), n_steps)).mean(1)
    return scores


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


def _requests_at_once(lm: LanguageModel, asked: Sequence[Sequence[Continuation]], n_steps: int) -> int:
    n_rows = max((len(prompts) * len(prompts[0].target) for prompts in asked), default=1)
    longest = max((len(prompt.row) for prompts in asked for prompt in prompts), default=1)
    run, earlier = (1, longest) if can_replay(lm) else (longest, 0)
    row = Footprint(run, earlier, lm.n_layers, 1, backward=True)
    return budget(lm.device) // (n_rows * n_steps * row.bytes(lm))


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
