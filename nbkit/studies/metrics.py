"""What an edit did: perplexity of fixed texts, and whether the edit is known, generalises and stays where it should.

    perplexity(lm, texts)                        # of the model as it is
    perplexity(lm, texts, edits=edits)           # an array, one value per edited model
    reference = neighborhood_tokens(lm, requests)            # on the unedited model
    with applied(lm, edit): edit_metrics(lm, [request], reference)
    edit_metrics(lm, requests, reference, edits=edits)       # the same for many, each with its own edit

An edited model is the one that `applied` makes and `lm.save` writes: its weights are W + ΔW, rounded to the model's
dtype. With `edits=` that is so in every dtype: in float32 and float64 many are read side by side with W and ΔW apart,
which is the same to rounding; in bfloat16 and float16, where it is not, one edit after the other lies in the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit, as_edits
from nbkit.errors import PromptError, RequestError
from nbkit.keys.extract import widened
from nbkit.models.edited import edited_logits, plain_logits
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import check_length, check_prefixes, target_ids, tokenize
from nbkit.models.rows import AskedRows
from nbkit.records.bars import bar
from nbkit.records.bounds import check_choice, check_number
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest

PerplexityKind = Literal["sentence_mean", "token"]
ROWS_IN_CACHE = 64  # of logits
EDITS_AT_ONCE = 256  # whose token scores are kept at a time; how many run together is for memory to say


@verb
def perplexity(
    lm: LanguageModel,
    texts: Sequence[str],
    edits: Sequence[Edit] | None = None,
    kind: PerplexityKind = "sentence_mean",
    batch_size: int = 64,
    progress: bool = True,
) -> float | np.ndarray:
    """Perplexity of `texts`; with `edits`, one value per edited model (they do not add up), the model unchanged.

    Edited models have W + ΔW rounded to the model's dtype for weights, as with `applied`; many at once in float32 and
    float64, one after the other in bfloat16 and float16.

    "sentence_mean" is the papers' (A and B): exp of each text's mean negative log-likelihood, then the arithmetic mean
    over texts, so one long-winded failure weighs as much as a whole text. "token" is exp of the mean over all tokens.
    In both no special token is added and a text's first token is not scored. Infinite and NaN values are returned as
    such. PromptError for a text of fewer than two tokens or longer than the context.
    """
    check_choice("kind", kind, ("sentence_mean", "token"))
    check_number("batch_size", batch_size, whole=True, least=1)
    edits = None if edits is None else as_edits(edits)
    rows = tokenize(lm, texts, add_special_tokens=False)
    if not rows:
        raise PromptError("perplexity needs at least one text")
    for text, row in zip(texts, rows, strict=True):
        if len(row) < 2:
            raise PromptError(f"perplexity needs at least two tokens, and {text!r} has {len(row)}")
    contexts, targets = [row[:1] for row in rows], [row[1:] for row in rows]
    n_read, name = len(rows) * (1 if edits is None else len(edits)), f"{lm.title}: perplexity"
    with bar(n_read, name, "text", progress) as shown:
        if edits is None:
            scores = _token_scores(lm, contexts, targets, batch_size, choose=False, advance=shown.update)
            return _perplexity(scores, kind)
        values = np.full(len(edits), np.nan)
        for start in range(0, len(edits), EDITS_AT_ONCE):
            some, n = edits[start : start + EDITS_AT_ONCE], len(rows)
            edit_of = np.repeat(np.arange(len(some)), n).tolist()
            asked = contexts * len(some), targets * len(some)
            scores = _token_scores(lm, *asked, edits=some, edit_of=edit_of, choose=False, advance=shown.update)
            for place in range(len(some)):
                values[start + place] = _perplexity(scores[place * n : (place + 1) * n], kind)
    return values


def _perplexity(scores: "Sequence[_Scores]", kind: PerplexityKind) -> float:
    nll = np.array([_sum_nll(score) for score in scores])
    lengths = np.array([len(score.log_probabilities) for score in scores])
    with np.errstate(over="ignore"):
        return float(np.exp(nll / lengths).mean() if kind == "sentence_mean" else np.exp(nll.sum() / lengths.sum()))


@dataclass(frozen=True)
class _Scores:
    """Of the tokens of one target: log-probability of each, and the token the model would have chosen, if asked for."""

    log_probabilities: np.ndarray
    choices: tuple[int, ...]


def _sum_nll(scores: _Scores) -> float:
    return -float(scores.log_probabilities.sum())


@torch.no_grad()
def _token_scores(
    lm: LanguageModel,
    contexts: Sequence[list[int]],
    targets: Sequence[list[int]],
    batch_size: int = 64,
    edits: Sequence[Edit] | None = None,
    edit_of: Sequence[int] | None = None,
    choose: bool = True,
    advance: Callable[[int], object] = lambda n: None,
) -> list[_Scores]:
    """Score each target's tokens behind its context, by the model as it is, or by that with edit number edit_of[i].

    A target's last token is only ever predicted, never read: pairs that differ in nothing else share a row. advance: is
    told of how many more pairs that is done.
    """
    rows: dict[tuple[int, ...], int] = {}
    pairs_of: dict[tuple[int, int], list[int]] = {}  # by edit and row
    for pair, (context, target) in enumerate(zip(contexts, targets, strict=True)):
        row = rows.setdefault((len(context), *context, *target[:-1]), len(rows))
        pairs_of.setdefault((0 if edits is None else edit_of[pair], row), []).append(pair)
    read = AskedRows([row for _, *row in rows], wanted=[range(length - 1, len(row)) for length, *row in rows])
    if edits is None:
        plain = plain_logits(lm, read, range(len(rows)), batch_size)
        passes = (([(0, row) for row in read_now], logits) for read_now, logits in plain)
    else:
        rows_of: list[list[int]] = [[] for _ in edits]
        for edit, row in pairs_of:
            rows_of[edit].append(row)
        passes = edited_logits(lm, edits, read, rows_of)

    scores: dict[int, _Scores] = {}
    for read_now, logits in passes:
        starts = np.cumsum([0, *(len(read.wanted[row]) for _, row in read_now)])
        asked = [
            (pair, start)
            for read_by, start in zip(read_now, starts[:-1].tolist(), strict=True)
            for pair in pairs_of[read_by]
        ]
        places = torch.tensor([start + i for pair, start in asked for i in range(len(targets[pair]))])
        tokens = torch.tensor([token for pair, _ in asked for token in targets[pair]])
        logits = widened(logits)
        places_there = places.to(lm.device)
        log_probabilities = logits[places_there, tokens.to(lm.device)] - _log_normaliser(logits)[places_there]
        log_probabilities = log_probabilities.double().cpu().numpy()
        choices = logits.argmax(-1).cpu().numpy()[places.numpy()] if choose else np.empty(len(places), int)
        ends = np.cumsum([len(targets[pair]) for pair, _ in asked])[:-1]
        parts = zip(asked, np.split(log_probabilities, ends), np.split(choices, ends), strict=True)
        scores |= {pair: _Scores(values, tuple(chosen.tolist())) for (pair, _), values, chosen in parts}
        advance(len(asked))
    return [scores[pair] for pair in range(len(targets))]


def _log_normaliser(logits: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """log Σ exp of each row; on a CPU a few rows at a time, whose copies then stay in its cache."""
    parts = logits.split(ROWS_IN_CACHE) if logits.device.type == "cpu" else [logits]
    return torch.cat([part.logsumexp(-1) for part in parts])


@verb
def score_targets(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    batch_size: int = 64,
    edits: Sequence[Edit] | None = None,
    edit_of: Sequence[int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How each target continues its prompt, teacher-forced: one row a pair, in order.

    With `edits`, pair i is asked of the model with edit number edit_of[i]; the model is not changed.

    Columns: `nll`, the mean negative log-likelihood of the target's tokens; `probability`, of the whole target;
    `correct`, whether every token of the target is the model's first choice; `choices`, the tuple of those first
    choices.
    """
    contexts = tokenize(lm, prompts)
    ids = [target_ids(lm, target) for target in targets]
    for prompt, context, target in zip(prompts, contexts, ids, strict=True):
        check_length(lm, context + target, prompt)
    with bar(len(ids), f"{lm.title}: scores of targets", "prompt", progress) as shown:
        scores = _token_scores(lm, contexts, ids, batch_size, edits, edit_of, advance=shown.update)
    return pd.DataFrame(
        {
            "nll": [_sum_nll(score) / len(target) for score, target in zip(scores, ids, strict=True)],
            "probability": [float(np.exp(-_sum_nll(score))) for score in scores],
            "correct": [score.choices == tuple(target) for score, target in zip(scores, ids, strict=True)],
            "choices": [score.choices for score in scores],
        }
    )


@verb
def neighborhood_tokens(lm: LanguageModel, requests: Sequence[EditRequest]) -> dict[EditRequest, list[tuple[int, ...]]]:
    """The model's own first choices on every neighbourhood prompt, teacher-forced on its answer.

    Locality compares with them: call it on the unedited model.
    """
    pairs = [pair for request in requests for pair in _neighbors(request)]
    if not pairs:
        return {request: [] for request in requests}
    choices = iter(score_targets(lm, *zip(*pairs, strict=True))["choices"])
    return {request: [next(choices) for _ in _neighbors(request)] for request in requests}


@verb
def edit_metrics(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    reference: Mapping[EditRequest, Sequence[tuple[int, ...]]] | None = None,
    prefix: str | Sequence[str] = "{}",
    batch_size: int = 64,
    edits: Sequence[Edit] | None = None,
    progress: bool = True,
    prefix_paraphrases: bool = False,
) -> pd.DataFrame:
    """Edit metrics of the model as it is now (apply the edit first): one row a request, in order.

    With `edits`, one a request, each request is asked of the model with its own edit instead: weights W + ΔW rounded to
    the model's dtype, as with `applied`. Many in one pass in float32 and float64, one by one in bfloat16 and float16.

    CounterFact's (kmeng01/rome), shares in [0, 1]: `efficacy`, `paraphrase`: is the new target likelier than the true
    one, by mean negative log-likelihood, on the prompt, on its paraphrases; `neighborhood`: is the true answer likelier
    than the new target on neighbouring subjects. Their argmax forms ask whether the expected target is the model's
    first choice. EasyEdit's: `reliability`, `generalization`: share of the new target's tokens that are first choices,
    teacher-forced, on the prompt and the paraphrases; `locality`: share of the first choices on neighbours that are
    those of `reference` (`neighborhood_tokens` of the unedited model). `target_probability` is that of the whole new
    target on the prompt. CounterFact's magnitudes, `efficacy_magnitude` and so on, are by how much it is likelier, in
    [-1, 1]: the difference of the two probabilities a token, exp(-mean negative log-likelihood), as a mean over
    prompts; of the new target less the true one, on neighbours of the true answer less the new target. What the model
    says by itself is for `generation_metrics`. NaN where a request has nothing to measure it by. `prefix`, a template
    with one {} or one for each request, goes before the rewrite prompt only, as in *The Fall of ROME*, and with
    `prefix_paraphrases` before its paraphrases too; never before neighbours.
    """
    requests, edits = as_requests(requests), None if edits is None else as_edits(edits)
    check_number("batch_size", batch_size, whole=True, least=1)
    asked: list[tuple[int, str, str, str]] = []  # (request, role, prompt, target)
    prefixes = check_prefixes(prefix, len(requests))
    if edits is not None and len(edits) != len(requests):
        raise RequestError(f"{len(edits)} edits for {len(requests)} requests; each request is asked of its own edit")
    for index, (request, before) in enumerate(zip(requests, prefixes, strict=True)):
        template = before if prefix_paraphrases else "{}"
        roles = [("prompt", before.replace("{}", request.text))] + [
            ("paraphrase", template.replace("{}", text)) for text in request.paraphrase_prompts
        ]
        for role, text in roles:
            asked.append((index, role, text, request.target_new))
            if request.target_true is not None:
                asked.append((index, role + " true", text, request.target_true))
        for text, answer in _neighbors(request):
            asked += [(index, "neighbor", text, answer), (index, "neighbor new", text, request.target_new)]
    if not asked:
        return pd.DataFrame()
    indices, _, prompts, targets = zip(*asked, strict=True)
    scores = score_targets(lm, prompts, targets, batch_size, edits, indices, progress)
    scores["request"], scores["role"] = [row[0] for row in asked], [row[1] for row in asked]
    scores["share"] = [
        np.mean(np.equal(choices, target_ids(lm, target)))
        for choices, target in zip(scores["choices"], targets, strict=True)
    ]
    by_request = dict(list(scores.groupby("request")))
    rows = []
    for index, request in enumerate(requests):
        part = {role: group.reset_index(drop=True) for role, group in by_request[index].groupby("role")}
        if reference is not None and request not in reference:
            raise RequestError(f"the reference holds nothing for {request.label}; make it with neighborhood_tokens")
        old = None if reference is None else reference[request]
        rows.append({"case_id": request.case_id} | _metrics(part, old))
    return pd.DataFrame(rows)


def _metrics(part: dict[str, pd.DataFrame], reference: Sequence[tuple[int, ...]] | None) -> dict[str, float]:
    def likelier(role: str, than: str) -> float:
        if role not in part or than not in part:
            return np.nan
        return _share(part[role]["nll"].to_numpy(), part[than]["nll"].to_numpy())

    def by_how_much(role: str, than: str) -> float:
        if role not in part or than not in part:
            return np.nan
        return float((np.exp(-part[role]["nll"]) - np.exp(-part[than]["nll"])).mean(skipna=False))

    def mean(role: str, column: str) -> float:
        return float(part[role][column].mean()) if role in part else np.nan

    locality = np.nan
    if reference is not None and "neighbor" in part:
        locality = float(
            np.mean([np.mean(np.equal(*pair)) for pair in zip(part["neighbor"]["choices"], reference, strict=True)])
        )
    return {
        "efficacy": likelier("prompt", "prompt true"),
        "efficacy_magnitude": by_how_much("prompt", "prompt true"),
        "efficacy_argmax": mean("prompt", "correct"),
        "target_probability": mean("prompt", "probability"),
        "paraphrase": likelier("paraphrase", "paraphrase true"),
        "paraphrase_magnitude": by_how_much("paraphrase", "paraphrase true"),
        "paraphrase_argmax": mean("paraphrase", "correct"),
        "neighborhood": likelier("neighbor", "neighbor new"),
        "neighborhood_magnitude": by_how_much("neighbor", "neighbor new"),
        "neighborhood_argmax": mean("neighbor", "correct"),
        "reliability": mean("prompt", "share"),
        "generalization": mean("paraphrase", "share"),
        "locality": locality,
    }


def _share(nll: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs in which the first is likelier; NaN, from a model that an edit broke, is not likelier."""
    return float(np.mean(nll < other))


def _neighbors(request: EditRequest) -> list[tuple[str, str]]:
    return list(zip(request.neighborhood_prompts, request.neighborhood_targets, strict=True))
