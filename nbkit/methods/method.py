"""What a method is to the verbs that run it: two functions at most, and what each is given."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from nbkit.edits.edit import Edit
from nbkit.keys.moments import SecondMoments
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import in_batches
from nbkit.records.requests import EditRequest

Result = TypeVar("Result")
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
    files: (lm, parameters) -> the files that its numbers depend on besides the model's, which name stored results too.
    template_lengths: of the context templates sampled where none are given, see `prompts.context_templates`; empty
    for a method that uses none.
    """

    parameters: type
    each: Callable[[LanguageModel, Sequence[EditRequest], Setting], list[Edit]]
    together: Callable[[LanguageModel, Sequence[EditRequest], Setting], Edit] | None = None
    needs_second_moment: bool = False
    template_lengths: Sequence[tuple[int, int]] = ()
    files: Callable[[LanguageModel, Any], list[Path]] = lambda lm, parameters: []


def side_by_side(
    setting: Setting, costs: Sequence, at_once: int, compute: Callable[[Sequence[int]], Result], name: str
) -> Iterator[tuple[list[int], Result]]:
    """`compute` on the places of all items, those of like cost together, with a bar where `setting` asks for one.

    costs: of each item, what padding in a batch depends on. at_once: items for which there is memory, unless `setting`
    says how many.
    """
    order = sorted(range(len(costs)), key=costs.__getitem__)
    with tqdm(total=len(costs), desc=name, unit="edit", disable=not setting.progress) as bar:
        batches = in_batches(order, setting.batch_size or at_once, lambda places: (list(places), compute(places)))
        for places, result in batches:
            bar.update(len(places))
            yield places, result
