"""The three verbs that run a method, which are never the same thing:

    edits = edit(lm, requests, method="rome", key_mode="prefixed")      # independent: one Edit each, of the same model
    one = edit_batch(lm, requests, method="memit")                      # a batch: ONE Edit that carries all requests
    for step in edit_sequence(lm, requests, method="memit", per_step=10):
        ...                                                             # in sequence: lm carries all edits so far

`edit` and `edit_batch` leave the model unchanged, `edit_sequence` gives the weights back as they were.

All edit the model as it is, with what `lm.apply` or an open `with applied(...)` put into it. But context templates and
second moments that are not given are those of the unedited model, in a sequence and on top of any edit: they stand for
ordinary text, which an edited model may no longer write or read as such.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nbkit.edits.door import in_use, verb
from nbkit.edits.edit import Edit
from nbkit.edits.overlays import restoring, unedited
from nbkit.errors import MethodError
from nbkit.keys.moments import default_second_moments
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.methods.guard import Guard, guarding
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.method import MethodSettings
from nbkit.methods.regularising import regularising
from nbkit.methods.sequence_state import SequenceState, lay
from nbkit.methods.table import METHODS, method_named
from nbkit.models import prompts
from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import steps as steps_of
from nbkit.records.bounds import check_number, shown
from nbkit.records.lists import as_requests
from nbkit.records.requests import EditRequest


@dataclass(frozen=True)
class Step:
    """One edit of a sequence; while it is in the caller's hands the model carries this and all earlier edits."""

    index: int  # from 0
    requests: tuple[EditRequest, ...]
    edit: Edit
    state: Callable[[], SequenceState] = dataclasses.field(repr=False, compare=False)  # to `start` another one from

    @property
    def request(self) -> EditRequest:
        """The request of a step that has exactly one."""
        (request,) = self.requests
        return request


@verb
def edit(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    batch_size: int | None = None,
    guard: Guard | None = None,
    regularise: Mapping[str, Any] | None = None,
    **hparams: Any,
) -> list[Edit]:
    """Independent edits of the model as it is, one Edit a request; the model is unchanged afterwards.

    method: "ft" (fine-tuning), "kn" (knowledge neurons), "mend", "rome" (with key_mode "mixed", "prefixed" for C-ROME,
    "plain" for p-ROME), "memit", "emmet", "alphaedit", "encore", "ultraedit" or "locft-bf" (fine-tuning breadth first).
    Their hyper-parameters and defaults by family of models stand in nbkit/methods/hparams.toml;
    `nbkit.methods.hyper_parameters(lm, method)` shows those of a model.

    Many are computed side by side where the method can, and do not see each other: batch_size at once, or as many as
    memory takes.

    context_templates: the first must be "{}", which ROME alone can do without (methods/rome.py); None samples the
    method's own from the unedited model with seed 0.
    second_moment: E[k kᵀ], one matrix or {layer: matrix}, or a SecondMoments, whose factors then serve many calls.
    None: ROME takes the identity; a method that cannot do without has it computed once, of the unedited model on its
    default text, and cached (`moments.default_second_moments`). hparams override hparams.toml, of which None takes the
    default. progress: a bar, when there is more than one request. MethodError for an unknown method or hyper-parameter.
    guard: what is done with edits that ordinary text would feel too much of (`nbkit.Guard`); None returns all.
    regularise: a regulariser by name with its arguments, as {"name": "rect", "keep": 0.4}; each edit is then what
    `nbkit.regularise` makes of it. The guard judges that.
    """
    requests, regularised = as_requests(requests), regularising(lm, regularise)
    if batch_size is not None:
        check_number("batch_size", batch_size, whole=True, least=1)
    run = {"progress": progress and len(requests) > 1, "batch_size": batch_size}
    settings = settings_for(lm, method, context_templates, second_moment, hparams, wait=progress, **run)
    guarded = guarding(lm, guard, settings, progress)
    return guarded(METHODS[method].each(lm, requests, settings), regularised)


@verb
def edit_batch(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "memit",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    guard: Guard | None = None,
    regularise: Mapping[str, Any] | None = None,
    **hparams: Any,
) -> Edit:
    """ONE edit that carries all requests; the model is unchanged afterwards. Arguments as in `edit`.

    guard: of the edit as a whole, which is refused with all of its requests.

    MethodError for a method that makes one edit of one request, as ROME does, and for no requests.
    """
    requests, regularised = as_requests(requests), regularising(lm, regularise)
    together = together_of(method)
    if not requests:
        raise MethodError("a batch needs at least one request")
    run = {"progress": progress and len(requests) > 1}
    settings = settings_for(lm, method, context_templates, second_moment, hparams, wait=progress, **run)
    guarded = guarding(lm, guard, settings, progress)
    (made,) = guarded([together(lm, requests, settings)], regularised)
    return made


@verb
def edit_sequence(
    lm: LanguageModel,
    requests: EditRequest | Sequence[EditRequest],
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    progress: bool = True,
    per_step: int = 1,
    guard: Guard | None = None,
    start: SequenceState | None = None,
    regularise: Mapping[str, Any] | None = None,
    **hparams: Any,
) -> Iterator[Step]:
    """Edit by edit, each computed on the already edited model; arguments as in `edit`, checked at once.

    per_step: how many requests each edit of the sequence carries; more than one is for methods that make batches. The
    last step has those that are left. guard: of each step's edit, against the weights that it meets; the sequence goes
    on without one that is refused.

    regularise: of each step's edit, before the guard and before it is in the weights: W is the weight that the edit
    meets, with all edits before it, as in RECT. An edit of several layers is regularised when it is whole, one weight
    after another: MEMIT computes a layer in the model that carries the plain updates of those below, as the published
    MEMIT with RECT does (AlphaEdit's repository, memit_rect_main.py). What later steps know of it besides the weights,
    such as AlphaEdit's keys, stays the plain edit's. What is random is drawn anew in each step: by
    numpy.random.SeedSequence([seed, index of the step]), so that a sequence that goes on draws what it would have.

    start: `state()` of a step of a sequence of the same model, requests and arguments, which this one then goes on
    from, as if it had never ended: the requests up to there are not edited again, and `Step.index` counts on.
    MethodError for a state that is further than the requests reach, ModelError for one of another model.

    Between two steps the model carries all edits so far. When the loop ends, breaks off or raises, the weights are
    restored bit for bit (if the iterator was kept under a name: once it is closed, or collected; not in the middle of
    a verb). Two loops side by side see each other's edits, and each takes out its own.
    """
    requests, regularised = as_requests(requests), regularising(lm, regularise)
    check_number("per_step", per_step, whole=True, least=1)
    together = None if per_step == 1 else together_of(method)
    settings = settings_for(lm, method, context_templates, second_moment, hparams, wait=progress)
    guarded = guarding(lm, guard, settings, progress)
    chunks = [tuple(requests[place : place + per_step]) for place in range(0, len(requests), per_step)]
    start = SequenceState(0, {}) if start is None else start
    if not isinstance(start, SequenceState):
        raise MethodError(f"start must be the state of a step of a sequence, not {shown(start)}")
    if start.n_steps > len(chunks):
        raise MethodError(f"the sequence is to start behind edit {start.n_steps}, and has {len(chunks)}")

    def steps() -> Iterator[Step]:
        earlier, changed = list(start.remembered), dict.fromkeys(start.weights)

        def state(n_steps: int) -> SequenceState:
            weights = {name: lm.model.get_parameter(name).detach().to("cpu", copy=True) for name in changed}
            return SequenceState(n_steps, weights, tuple(earlier))

        with restoring(lm) as add:
            with in_use(lm):
                lay(lm, start, add)
            name, with_bar = f"{lm.title}: {method}, in sequence", progress and len(chunks) > 1
            left = steps_of(chunks[start.n_steps :], name, "edit", with_bar, delay=0)
            for index, chunk in enumerate(left, start.n_steps):
                with in_use(lm):
                    here = dataclasses.replace(settings, earlier=tuple(earlier))
                    new = together(lm, chunk, here) if together else METHODS[method].each(lm, chunk, here)[0]
                    (new,) = guarded([new], partial(regularised, step=index))
                    add(new)
                changed |= dict.fromkeys(new.deltas)
                if new.info.get("guard") != "refused":  # whose keys are in no weight, and so are not to be spared
                    earlier.append(METHODS[method].remembers(new, settings.parameters))
                yield Step(index, chunk, new, partial(state, index + 1))

    return steps()


def settings_for(
    lm: LanguageModel,
    method: str,
    context_templates: Sequence[str] | None,
    second_moment: SecondMomentLike,
    hparams: Mapping[str, Any],
    wait: bool = True,
    **run: Any,
) -> MethodSettings:
    """What the arguments of `edit` mean for this model; run: the other fields of MethodSettings.

    wait: whether second moments that are computed here have a bar.
    """
    parameters = hyper_parameters(lm, method, **hparams)
    templates = as_templates(lm, context_templates, method)
    moments = needed_moments(lm, method, parameters, second_moment, wait)
    return MethodSettings(method, parameters, templates, SecondMoments.of(moments, lm), **run)


def together_of(method: str) -> Callable[..., Edit]:
    """The function of a method that makes one edit of many requests; MethodError for another's."""
    together = method_named(method).together
    if together is None:
        can = ", ".join(name for name, known in METHODS.items() if known.together)
        raise MethodError(
            f"{method} makes one edit of one request, not of a batch; use edit or edit_sequence, or one of {can}"
        )
    return together


def as_templates(lm: LanguageModel, templates: Sequence[str] | None, method: str = "rome") -> list[str]:
    """The templates given, or else those of the method, sampled from the unedited model with seed 0."""
    if templates is None:
        with unedited(lm):
            return prompts.context_templates(lm, seed=0, lengths=method_named(method).template_lengths)
    return prompts.check_templates(templates, method_named(method).plain_template)


def needed_moments(
    lm: LanguageModel, method: str, parameters: Any, given: SecondMomentLike, progress: bool = True
) -> SecondMomentLike:
    """What is given; if that is None and the method cannot do without, the unedited model's on its default text."""
    if given is None and method_named(method).needs_second_moment:
        with unedited(lm):  # its files are named by the model's hash, which is then the unedited one's too
            return default_second_moments(lm, parameters.layers, progress)
    return given
