"""Perplexity and edit metrics by their formulae and nothing else: one text through the whole model at a time.

    perplexity = mean over texts of exp( -1/(T-1) Σ_{t>1} log p(x_t | x_<t) )        no special token, x_1 not scored
    nll(prompt, target) = -1/T Σ_t log p(target_t | prompt, target_<t)
    efficacy = nll(prompt, new) < nll(prompt, true); paraphrase the same on paraphrases, as a share
    neighborhood = share of neighbours with nll(neighbour, its answer) < nll(neighbour, new)

Slow and plain on purpose: it is what nbkit.studies.metrics is compared to. A request has the fields of
`nbkit.EditRequest`.
"""

import math

import torch


def perplexity(model, tokenizer, texts: list[str]) -> float:
    """The mean over texts of exp of each one's mean negative log-likelihood."""
    values = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        log_p = log_probabilities(model, ids)[:-1]
        values.append((-of_tokens(log_p, ids[1:]).mean()).exp().item())
    return sum(values) / len(values)


def neighborhood_tokens(model, tokenizer, request) -> list[list[int]]:
    """The first choices of the model, which should be the unedited one, on each neighbour's answer."""
    pairs = zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True)
    return [continuation(model, tokenizer, prompt, answer)["choices"] for prompt, answer in pairs]


def edit_metrics(model, tokenizer, request, reference: list[list[int]]) -> dict[str, float]:
    """All metrics of one request on the edited model; `reference` is `neighborhood_tokens` of the unedited one.

    A request without a true target, paraphrases or neighbours has NaN for what would be measured by them.
    """
    new, true = request.target_new, request.target_true
    plain = continuation(model, tokenizer, request.text, new)
    paraphrases = [continuation(model, tokenizer, prompt, new) for prompt in request.paraphrase_prompts]
    pairs = list(zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True))
    neighbors = [continuation(model, tokenizer, prompt, answer) for prompt, answer in pairs]
    neighbors_new = [continuation(model, tokenizer, prompt, new) for prompt, _ in pairs]
    measured = {
        "efficacy_argmax": float(plain["correct"]),
        "target_probability": plain["probability"],
        "paraphrase_argmax": mean(part["correct"] for part in paraphrases),
        "neighborhood": mean(old["nll"] < new["nll"] for old, new in zip(neighbors, neighbors_new, strict=True)),
        "neighborhood_argmax": mean(part["correct"] for part in neighbors),
        "reliability": plain["share"],
        "generalization": mean(part["share"] for part in paraphrases),
        "locality": mean(
            mean(now == before for now, before in zip(part["choices"], old, strict=True))
            for part, old in zip(neighbors, reference, strict=True)
        ),
        "efficacy": math.nan,
        "paraphrase": math.nan,
    }
    if true is not None:
        measured["efficacy"] = float(plain["nll"] < continuation(model, tokenizer, request.text, true)["nll"])
        on_true = [continuation(model, tokenizer, prompt, true) for prompt in request.paraphrase_prompts]
        measured["paraphrase"] = mean(a["nll"] < b["nll"] for a, b in zip(paraphrases, on_true, strict=True))
    return measured


def continuation(model, tokenizer, prompt: str, target: str) -> dict:
    """How the model continues `prompt` by `target`: nll and probability, its own choices, and how many are right."""
    before = tokenizer(prompt).input_ids
    ids = tokenizer(" " + target, add_special_tokens=False).input_ids
    log_p = log_probabilities(model, before + ids)[len(before) - 1 : -1]  # (target token, vocabulary)
    scores, choices = of_tokens(log_p, ids), log_p.argmax(-1).tolist()
    return {
        "nll": -scores.mean().item(),
        "probability": scores.sum().exp().item(),
        "choices": choices,
        "share": mean(choice == token for choice, token in zip(choices, ids, strict=True)),
        "correct": choices == ids,
    }


@torch.no_grad()
def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of what follows each token of a text: (token, vocabulary)."""
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits.log_softmax(-1)


def of_tokens(log_p: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of each row (token, vocabulary) the entry of its token, in float64: (token,)."""
    return log_p.gather(1, torch.tensor(ids, device=log_p.device)[:, None])[:, 0].double()


def mean(values) -> float:
    """The mean; NaN of nothing."""
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else math.nan
