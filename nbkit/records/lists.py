"""Lists that a user gives, held to what they should hold: a text is no list of its letters, a dict none of its keys.

    requests, texts = as_requests(requests), as_texts(texts)
"""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from nbkit.errors import MethodError, NbkitError, PromptError, RequestError
from nbkit.records.bounds import check_text, shown
from nbkit.records.requests import EditRequest


def as_list(name: str, values: Any, of: str, error: type[NbkitError]) -> list:
    """The values of any iterable but a text, a set and a mapping; the error, saying of what a list is meant."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | set | frozenset | Mapping):
        raise error(f"{name} must be a list of {of}, not {shown(values)}")
    return list(values)


def as_requests(requests: Any) -> list[EditRequest]:
    """Requests, or one by itself, as a list; RequestError, by number, for what is none."""
    if isinstance(requests, EditRequest):
        return [requests]
    requests = as_list("requests", requests, "EditRequests", RequestError)
    for index, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise RequestError(f"request {index} is no EditRequest but {type(request).__name__}: {shown(request)}")
    return requests


def as_texts(texts: Any, name: str = "texts") -> list[str]:
    """Texts, which may be empty, as a list; PromptError, by number, for what is none."""
    texts = as_list(name, texts, "texts", PromptError)
    for index, text in enumerate(texts):
        check_text(f"{name}[{index}]", text, PromptError, empty=True)
    return texts


def check_seeds(seeds: Any) -> list[int]:
    """MethodError unless they are one or more different whole numbers from 0 on: the same one twice, rows twice."""
    given = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else []
    whole = all(isinstance(seed, Integral) and not isinstance(seed, bool) and seed >= 0 for seed in given)
    if not given or not whole or len(set(given)) < len(given):
        raise MethodError(f"seeds must be one or more different whole numbers from 0 on, not {shown(seeds)}")
    return [int(seed) for seed in given]
