"""What a method is to the verbs that run it: two functions at most, and what each is given and gives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from nbkit.edits.edit import Edit
from nbkit.edits.updates import Update
from nbkit.keys.solving import SecondMoments
from nbkit.models.language_model import LanguageModel
from nbkit.models.memory import by_cost
from nbkit.models.prompts import subject_kind
from nbkit.records.requests import EditRequest

Result = TypeVar("Result")


@dataclass(frozen=True)
class MethodSettings:
    """All that a method gets besides the model and the requests."""

    method: str  # the name that edits are given
    parameters: Any  # an instance of Method.parameters
    context_templates: Sequence[str]
    second_moments: SecondMoments
    progress: bool = False
    batch_size: int | None = None  # edits computed side by side; None: as many as memory takes
    earlier: Sequence[Mapping[str, Tensor]] = ()  # `Method.remembers` of edits of the same sequence, in the weights


@dataclass(frozen=True)
class Method:
    """A method by its functions, its hyper-parameters, and what it needs.

    each: (lm, requests, settings) -> one Edit a request, all of the model as it is. They do not see each other, though
    computed side by side, `settings.batch_size` at once or as many as memory takes.
    together: the same arguments, one Edit that carries all requests; None for a method that cannot. Neither changes
    the model.
    files: (lm, parameters) -> the files that its numbers depend on besides the model's, which name stored results too.
    takes_second_moment, needs_second_moment: whether it uses one that is given, and whether it cannot do without.
    template_lengths: of the context templates sampled where none are given, see `prompts.context_templates`; empty
    for a method that uses none. plain_template: whether the first that is given must be "{}".
    remembers: (an edit, parameters) -> what later edits of its sequence need of it besides the weights, on the CPU.
    """

    parameters: type
    each: Callable[[LanguageModel, Sequence[EditRequest], MethodSettings], list[Edit]]
    together: Callable[[LanguageModel, Sequence[EditRequest], MethodSettings], Edit] | None = None
    takes_second_moment: bool = False
    needs_second_moment: bool = False
    template_lengths: Sequence[tuple[int, int]] = ()
    plain_template: bool = True
    files: Callable[[LanguageModel, Any], list[Path]] = lambda lm, parameters: []
    remembers: Callable[[Edit, Any], Mapping[str, Tensor]] = lambda edit, parameters: {}


def edit_made(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    settings: MethodSettings,
    deltas: Mapping[str, Update],
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Edit:
    """The Edit of a method with these settings. Its info: that given, the subject_kind of a single request, tensors."""
    kind = {"subject_kind": subject_kind(lm, requests[0])} if len(requests) == 1 else {}
    info = {**info, **kind, **(tensors or {})}
    return Edit(deltas, tuple(requests), settings.method, asdict(settings.parameters), info)


def batches_by_cost(
    settings: MethodSettings, costs: Sequence, at_once: int, compute: Callable[[Sequence[int]], Result], name: str
) -> Iterator[tuple[list[int], Result]]:
    """Places of items, those of like cost together, and `compute` of them; with a bar where `settings` ask for one.

    costs: of each item, what padding in a batch depends on. at_once: items for which there is memory, unless
    `settings` say how many.
    """
    return by_cost(costs, settings.batch_size or at_once, compute, name, "edit", settings.progress, delay=0)
