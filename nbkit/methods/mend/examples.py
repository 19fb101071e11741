"""What a hypernetwork is trained on: edits, and what is asked of the edited model.

It is asked

1. for the target, on the request's prompt or one of its paraphrases;
2. for what should not change: on a text, at every token, and at the end of another prompt: the request's own neighbour
   where it has some, else another request's prompt: any, or one of the same relation or about the same subject.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nbkit.models.continuations import Continuation, continuations
from nbkit.models.language_model import LanguageModel
from nbkit.models.prompts import tokenize
from nbkit.records.requests import EditRequest


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
        self.of_relation, self.of_subject = defaultdict(list), defaultdict(list)
        for request in self.requests:
            self.of_relation[request.relation_id].append(request)
            self.of_subject[request.subject].append(request)

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
            text, target = request.neighborhood_prompts[number], request.neighborhood_targets[number]
            (neighbor,) = continuations(self.lm, [text], [target])
            return neighbor.row, neighbor.predicting
        pools = self.of_relation[request.relation_id], self.of_subject[request.subject], self.requests
        pool = pools[rng.integers(3)]
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
