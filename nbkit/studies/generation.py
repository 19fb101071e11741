"""What edited models say by themselves, beside the teacher-forced `edit_metrics`.

    generation_metrics(lm, requests, edits=edits)            # each request asked of the model with its own edit
    references = reference_texts(requests, facts, texts)     # {request: texts about what truly has its new target}
    generation_metrics(lm, requests, edits=edits, references=references)

Teacher forcing shows a model the target's earlier tokens and never asks where it would stop. Here nothing is shown and
the model stops by itself, after `max_tokens` at the latest, as in *The Mirage of Model Editing* (arXiv 2502.11177).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit, as_edits
from nbkit.edits.overlays import applied
from nbkit.errors import RequestError
from nbkit.models.generation import Generated, generated
from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import steps
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest

N_GRAMS = {2: 2 / 3, 3: 4 / 3}  # weights of their entropies, CounterFact's


@verb
def generation_metrics(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    edits: Sequence[Edit] | None = None,
    references: Mapping[EditRequest, Sequence[str]] | None = None,
    max_tokens: int = 50,
    end: str | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """What the model as it is says after each request's prompts, greedily: one row a request, in order.

    With `edits`, one a request, each request is asked of the model with its own edit, applied in turn (as with
    `applied`, in every dtype): only the prompts of one request run together. The model is unchanged afterwards.

    Columns, shares in [0, 1]: `efficacy_generated`, `paraphrase_generated`: whether the text generated after the
    prompt, the paraphrases, begins with the new target: letter by letter, after leading space, as whole words;
    `neighborhood_generated`: the same of the neighbours' own answers. `overgenerated`: of the texts of prompt and
    paraphrases that begin with the target, the share that goes on after it, by more than punctuation.
    `ended_generated`: of the same prompts' texts, all of them, the share that the model ended itself within
    `max_tokens`. `text_generated`: what it said after the prompt. A text ends where the model says its end-of-text
    token, and at `end` if that is given: a model whose training texts follow each other line by line, as the embedded
    ones', ends what it says by "\\n".

    Of the texts that `generation_prompts` open, the prompt included as in CounterFact's released evaluation:
    `entropy_generated`, the mean over texts of 1/2 (2/3 H_2 + 4/3 H_3), with H_n the entropy in bits of a text's
    n-grams (low where a model repeats itself; words and punctuation marks are told apart by a regular expression, not
    by nltk's tokenizer, and texts are greedy, where the release samples them from the five likeliest tokens, to 100
    tokens in all). `consistency_generated`, with `references`: the cosine of the TF-IDF vectors of all these texts and
    of the request's references, whose weights are those of all texts of `references` (0 where they share no word).

    NaN where a request has nothing to measure it by. RequestError for a request that `references` leave out,
    PromptError for a prompt that leaves no room for `max_tokens`.
    """
    requests, edits = as_requests(requests), None if edits is None else as_edits(edits)
    if edits is not None and len(edits) != len(requests):
        raise RequestError(f"{len(edits)} edits for {len(requests)} requests; each request is asked of its own edit")
    similar = None if references is None else _Similarity(references, requests)
    if edits is None:
        asked = [prompt for request in requests for prompt in _prompts(request)]
        said = iter(generated(lm, asked, max_tokens, batch_size, end, progress) if asked else ())
        texts = [[next(said) for _ in _prompts(request)] for request in requests]
    else:
        texts, each = [], list(zip(requests, edits, strict=True))
        for request, edit in steps(each, f"{lm.title}: generation after edits", "edit", progress):
            with applied(lm, edit):
                texts.append(generated(lm, _prompts(request), max_tokens, batch_size, end, progress=False))
    return pd.DataFrame(
        [
            {"case_id": request.case_id} | _metrics(request, of_request, similar)
            for request, of_request in zip(requests, texts, strict=True)
        ]
    )


def reference_texts(
    requests: Sequence[EditRequest], facts: Sequence[EditRequest], texts: Sequence[str], most: int | None = None
) -> dict[EditRequest, list[str]]:
    """{request: the first `most` texts that name a subject which truly has the request's new target}.

    facts: what is true, as requests with a target_true (`read_requests("miniworld-facts")`); a subject counts if one of
    them says that it has the new target by the same relation_id. The request's own subject does not count.
    """
    having = defaultdict(set)
    for fact in facts:
        if fact.target_true is not None:
            having[fact.relation_id, fact.target_true.strip()].add(fact.subject)
    naming = defaultdict(list)  # subject -> places of texts
    longest_first = sorted({subject for some in having.values() for subject in some}, key=len, reverse=True)
    if longest_first:
        names = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")
        for place, text in enumerate(texts):
            for subject in set(names.findall(text)):
                naming[subject].append(place)
    found = {}
    for request in requests:
        subjects = having.get((request.relation_id, request.target_new.strip()), set()) - {request.subject}
        places = sorted({place for subject in subjects for place in naming[subject]})
        found[request] = [texts[place] for place in places[:most]]
    return found


def begins_with(text: str, target: str) -> bool:
    """Whether a text says the target first, as whole words; leading space does not count."""
    return re.match(rf"\s*{re.escape(target.strip())}(?!\w)", text) is not None


def goes_on_after(text: str, target: str) -> bool:
    """Whether a text that begins with the target says more than punctuation after it."""
    return re.search(r"\w", text.lstrip()[len(target.strip()) :]) is not None


def entropy(text: str) -> float:
    """Weighted entropy, in bits, of a text's bigrams and trigrams; see `generation_metrics`. 0 for a text too short."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(weight * _entropy_of_n_grams(words, n) for n, weight in N_GRAMS.items()) / len(N_GRAMS)


def _entropy_of_n_grams(words: Sequence[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()))
    shares = counts / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())


class _Similarity:
    """TF-IDF cosine of texts and a request's references, weighted by all references, each text a document."""

    def __init__(self, references: Mapping[EditRequest, Sequence[str]], requests: Sequence[EditRequest]):
        for request in requests:
            if request not in references:
                raise RequestError(f"{request.label}: the references hold no texts for it; give it an empty list")
        self.references = references
        documents = dict.fromkeys(text for texts in references.values() for text in texts)
        self.vectors = TfidfVectorizer().fit(documents) if documents else None

    def of(self, request: EditRequest, texts: Sequence[str]) -> float:
        if not self.references[request] or not texts:
            return np.nan
        said, reference = self.vectors.transform([" ".join(texts), " ".join(self.references[request])])
        return float((said @ reference.T).sum())  # both of length 1, or 0


def _prompts(request: EditRequest) -> list[str]:
    about = (request.paraphrase_prompts, request.neighborhood_prompts, request.generation_prompts)
    return [request.text, *(prompt for prompts in about for prompt in prompts)]


def _metrics(request: EditRequest, said: Sequence[Generated], similar: _Similarity | None) -> dict[str, float | str]:
    remaining = iter(said)
    (prompt,) = plain = [next(remaining)]
    paraphrases = [next(remaining) for _ in request.paraphrase_prompts]
    neighbors = [next(remaining) for _ in request.neighborhood_prompts]
    opened = [before + next(remaining).text for before in request.generation_prompts]
    new = request.target_new
    told = [one.text for one in plain + paraphrases if begins_with(one.text, new)]
    answers = zip(neighbors, request.neighborhood_targets, strict=bool(request.neighborhood_targets))
    return {
        "efficacy_generated": float(begins_with(prompt.text, new)),
        "paraphrase_generated": _share(begins_with(one.text, new) for one in paraphrases),
        "neighborhood_generated": _share(begins_with(one.text, answer) for one, answer in answers),
        "overgenerated": _share(goes_on_after(text, new) for text in told),
        "ended_generated": _share(one.ended for one in plain + paraphrases),
        "entropy_generated": _share(map(entropy, opened)),
        "consistency_generated": np.nan if similar is None else similar.of(request, opened),
        "text_generated": prompt.text,
    }


def _share(values) -> float:
    """The mean; NaN of nothing."""
    values = list(values)
    return float(np.mean(values)) if values else np.nan
