"""Perplexity and edit metrics by their formulae and nothing else: one text through the whole model at a time.

    perplexity = mean over texts of exp( -1/(T-1) Σ_{t>1} log p(x_t | x_<t) )        no special token, x_1 not scored
    nll(prompt, target) = -1/T Σ_t log p(target_t | prompt, target_<t)
    efficacy = nll(prompt, new) < nll(prompt, true); paraphrase the same on paraphrases, as a share
    neighborhood = share of neighbours with nll(neighbour, its answer) < nll(neighbour, new)
    magnitude of each: the mean of exp(-nll) of what should be likelier, less exp(-nll) of the other
    entropy of a text = 1/2 (2/3 H_2 + 4/3 H_3), H_n = -Σ f log2 f over the frequencies f of its n-grams of words
    consistency = cosine of the TF-IDF vectors of two texts, tf (ln((1 + n) / (1 + n with the word)) + 1) of each word

Slow and plain on purpose: it is what nbkit.studies.metrics is compared to. A request has the fields of
`nbkit.EditRequest`.
"""

import math
import re
from collections import Counter

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
        "neighborhood_magnitude": mean(
            math.exp(-old["nll"]) - math.exp(-new["nll"]) for old, new in zip(neighbors, neighbors_new, strict=True)
        ),
        "efficacy": math.nan,
        "paraphrase": math.nan,
        "efficacy_magnitude": math.nan,
        "paraphrase_magnitude": math.nan,
    }
    if true is not None:
        other = continuation(model, tokenizer, request.text, true)
        measured["efficacy"] = float(plain["nll"] < other["nll"])
        measured["efficacy_magnitude"] = math.exp(-plain["nll"]) - math.exp(-other["nll"])
        on_true = [continuation(model, tokenizer, prompt, true) for prompt in request.paraphrase_prompts]
        measured["paraphrase"] = mean(a["nll"] < b["nll"] for a, b in zip(paraphrases, on_true, strict=True))
        measured["paraphrase_magnitude"] = mean(
            math.exp(-a["nll"]) - math.exp(-b["nll"]) for a, b in zip(paraphrases, on_true, strict=True)
        )
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


def generated(model, tokenizer, prompt: str, max_tokens: int, ends: list[int]) -> tuple[str, bool]:
    """What the model goes on with, always its first choice, and whether one of the tokens `ends` ended it."""
    ids = tokenizer(prompt).input_ids
    before = tokenizer.decode(ids, skip_special_tokens=True)
    for _ in range(max_tokens):
        token = int(log_probabilities(model, ids)[-1].argmax())
        if token in ends:
            return tokenizer.decode(ids, skip_special_tokens=True)[len(before) :], True
        ids = [*ids, token]
    return tokenizer.decode(ids, skip_special_tokens=True)[len(before) :], False


def entropy(text: str) -> float:
    """Weighted entropy, in bits, of a text's bigrams and trigrams of words; punctuation marks are words."""
    words = re.findall(r"\w+|[^\w\s]", text)
    bits = {}
    for n in (2, 3):
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        shares = [count / counts.total() for count in counts.values()]
        bits[n] = -sum(share * math.log2(share) for share in shares)
    return (2 / 3 * bits[2] + 4 / 3 * bits[3]) / 2


def consistency(text: str, references: list[str], all_references: list[str]) -> float:
    """TF-IDF cosine of a text and reference texts; words (of two letters or more) are weighed by all references."""
    known = [set(_words(reference)) for reference in all_references]
    weight = {
        word: math.log((1 + len(known)) / (1 + sum(word in one for one in known))) + 1 for word in set().union(*known)
    }
    a, b = Counter(_words(text)), Counter(_words(" ".join(references)))
    vectors = [{word: count * weight[word] for word, count in part.items() if word in weight} for part in (a, b)]
    lengths = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
    product = sum(value * vectors[1].get(word, 0) for word, value in vectors[0].items())
    return product / (lengths[0] * lengths[1]) if product else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())


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
