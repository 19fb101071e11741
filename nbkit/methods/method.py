"""What a method is to the verbs that run it: two functions at most, and what each is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from nbkit.edits import Edit
from nbkit.models import LanguageModel
from nbkit.moments import SecondMoments
from nbkit.requests import EditRequest

ROME_TEMPLATES = ((5, 10), (10, 10))  # (tokens, how many of that length): the prefixes that ROME averages over
MEMIT_TEMPLATES = ((10, 5),)


@dataclass(frozen=True)
class Setting:
    """All that a method gets besides the model and the requests."""

    parameters: Any  # an instance of Method.parameters
    context_templates: Sequence[str]
    second_moments: SecondMoments
    progress: bool = False
    batch_size: int | None = None  # edits computed side by side; None: as many as memory takes
    earlier: Sequence[Edit] = ()  # of the same sequence, in order; the weights carry them
    method: str = ""  # the name that edits are given


@dataclass(frozen=True)
class Method:
    """A method by its functions, its hyper-parameters, and what it needs.

    each: (lm, requests, setting) -> one Edit a request, all of the model as it is. together: the same arguments, one
    Edit that carries all requests; None for a method that cannot. Neither changes the model.
    template_lengths: of the context templates sampled where none are given, see `prompts.context_templates`; empty for
    a method that uses none.
    """

    parameters: type
    each: Callable[[LanguageModel, Sequence[EditRequest], Setting], list[Edit]]
    together: Callable[[LanguageModel, Sequence[EditRequest], Setting], Edit] | None = None
    needs_second_moment: bool = False
    template_lengths: Sequence[tuple[int, int]] = ()


def one_by_one(
    together: Callable[[LanguageModel, Sequence[EditRequest], Setting], Edit], name: str
) -> Callable[[LanguageModel, Sequence[EditRequest], Setting], list[Edit]]:
    """`each` for a method whose edit of one request is a batch of one."""

    def each(lm: LanguageModel, requests: Sequence[EditRequest], setting: Setting) -> list[Edit]:
        bar = tqdm(requests, desc=name, unit="edit", disable=not setting.progress)
        return [together(lm, [request], setting) for request in bar]

    return each
