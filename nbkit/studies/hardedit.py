"""A set like HardEdit for any model: requests about single common words that open the prompt.

    made = hardedit(lm, materials(lm.known_as), n=24, seed=0)
    made.requests, made.dropped

The model's tokenizer decides which words are one token, and the model what the old target is. See records/hardedit.py
for what it is put together from.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from nbkit.edits.door import verb
from nbkit.errors import RequestError, ResultsError
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import subject_kind
from nbkit.records.bars import bar
from nbkit.records.bounds import check_number
from nbkit.records.hardedit import Materials, Relation, write_card
from nbkit.records.request_files import write_requests
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import score_targets

TWICE, TAKEN = "words given twice", "words that are a subject of other requests"
LONG, SAID = (
    "words of more than one token at the start of a prompt",
    "prompts with no target that the model does not say",
)
AT_ONCE = 16  # prompts whose targets are scored together
Draw = tuple[str, Relation, str]  # word, relation, template


@dataclass(frozen=True)
class HardEdit:
    """requests: the set. dropped: {why: how many words or prompts}. usable: how many words were left to draw from."""

    requests: list[EditRequest]
    dropped: dict[str, int]
    usable: int


@verb
def hardedit(lm: LanguageModel, given: Materials, n: int, seed: int = 0, progress: bool = True) -> HardEdit:
    """`n` requests, each a word in front of a template; the model as it is says what it would answer, and is unchanged.

    A word is used once before any is used twice, and never twice with a template. Of the relation's targets,
    target_true is the likeliest at the prompt, target_new is drawn from the others, but for any that the model says
    (each of its tokens the first choice) and the word itself. The same seed gives the same set.

    RequestError if the words and templates do not make so many.
    """
    check_number("n", n, whole=True, error=RequestError, least=1)
    check_number("seed", seed, whole=True, error=RequestError, least=0)
    words, dropped = _usable(lm, given)
    rng = np.random.default_rng(seed)
    drawn, made = _draws(words, given.relations, rng), []
    with bar(n, f"{lm.title}: requests about common words", "request", progress) as shown:
        while len(made) < n:
            prompts = list(islice(drawn, min(AT_ONCE, n - len(made))))
            if not prompts:
                why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
                raise RequestError(
                    f"only {len(made)} of {n} requests can be made of {len(words)} words and "
                    f"{sum(len(one.templates) for one in given.relations)} templates (dropped: {why or 'nothing'}); "
                    "give more words or relations, or ask for fewer"
                )
            for request in _answered(lm, prompts, rng):
                if request is None:
                    dropped[SAID] += 1
                else:
                    made.append(replace(request, case_id=f"hardedit-{len(made)}"))
                    shown.update()
    return HardEdit(made, dict(dropped), len(words))


def save_hardedit(lm: LanguageModel, made: HardEdit, given: Materials, path: str | Path, seed: int) -> list[Path]:
    """Writes the set to `path` as `read_requests` reads it, and its data card beside it as .md; returns both paths."""
    path = check_place(path)
    written = write_requests(path, made.requests)
    about = {"model": lm.title, "hash": lm.hash, "seed": seed, **given.sources}
    return [written, write_card(path.with_suffix(".md"), made.requests, made.dropped, **about)]


def check_place(path: str | Path) -> Path:
    """The path of a set that can be written there; ResultsError, before any model is loaded, for another."""
    path = Path(path).expanduser()
    if path.suffix != ".json" or path.is_dir():
        raise ResultsError(f"{path.name} is no file that ends in .json, which the set is written to")
    return path


def _usable(lm: LanguageModel, given: Materials) -> tuple[list[str], Counter]:
    """The words that may be subjects, and how many may not and why."""
    words, dropped = list(dict.fromkeys(given.words)), Counter()
    dropped[TWICE] += len(given.words) - len(words)
    templates = [template for relation in given.relations for template in relation.templates]
    kept = []
    for word in words:
        asked = (EditRequest(template, word, "x") for template in templates)
        if word in given.taken:
            dropped[TAKEN] += 1
        elif not all(subject_kind(lm, request) == "one-token first" for request in asked):
            dropped[LONG] += 1
        else:
            kept.append(word)
    return kept, +dropped


def _draws(words: list[str], relations: Sequence[Relation], rng: np.random.Generator) -> Iterator[Draw]:
    """Every word with every template, in rounds of which each has every word once."""
    places = [(relation, template) for relation in relations for template in relation.templates]
    orders = {word: rng.permutation(len(places)) for word in words}
    for number in range(len(places)):
        for word in rng.permutation(np.array(words, object)):
            yield (word, *places[orders[word][number]])


def _answered(lm: LanguageModel, prompts: Sequence[Draw], rng: np.random.Generator) -> Iterator[EditRequest | None]:
    """Each with the target that the model finds likeliest as the true one, and another that it does not say."""
    pairs = [(template.replace("{}", word), t) for word, relation, template in prompts for t in relation.targets]
    scores = score_targets(lm, *zip(*pairs, strict=True), progress=False)
    of_prompt = np.repeat(np.arange(len(prompts)), [len(relation.targets) for _, relation, _ in prompts])
    for place, (word, relation, template) in enumerate(prompts):
        scored = scores[of_prompt == place].assign(target=relation.targets)
        likeliest = scored["target"].iloc[int(np.argmax(scored["probability"]))]
        others = scored.loc[~scored["correct"] & ~scored["target"].isin([likeliest, word]), "target"].tolist()
        if not others:
            yield None
            continue
        rest = tuple(one.replace("{}", word) for one in relation.templates if one != template)
        new = others[int(rng.integers(len(others)))]
        yield EditRequest(template, word, new, likeliest, None, rest, relation_id=relation.relation_id)
