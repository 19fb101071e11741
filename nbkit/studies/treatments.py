"""What can be done to a model, as values that an Edit can be made of: single edits, batches, sequences stopped early,
each of them regularised or not, and noise that is no edit at all.

    scaled = Treatment("ROME scaled", "single", "rome", (request,), regulariser="scale", arguments={"factor": 0.3})
    (edit,) = edits_of(lm, [scaled])
    with applied(lm, edit): ...

A treatment says nothing of what it does to the model. `treatment_pool.pool` draws many, of many sources.
"""

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from nbkit.edits.door import verb
from nbkit.edits.edit import Edit
from nbkit.edits.imitations import gaussian
from nbkit.edits.regularisers import accumulated, regularise
from nbkit.edits.updates import Dense
from nbkit.errors import MethodError, NbkitError
from nbkit.methods.verbs import edit, edit_batch, edit_sequence
from nbkit.models.language_model import LanguageModel
from nbkit.records.bars import bar
from nbkit.records.bounds import check_choice, check_number, check_text, shown
from nbkit.records.lists import as_list, as_requests
from nbkit.records.provenance import digest
from nbkit.records.requests import EditRequest

WAYS = ("single", "batch", "sequence", "noise")


@dataclass(frozen=True)
class Treatment:
    """One thing done to the unedited model.

    source: a name for people, which determines nothing. way: "single" (one request), "batch" (one edit of all),
    "sequence" (one after another) or "noise". settings: arguments of `nbkit.edit` besides the method (layer,
    second_moment, context_templates ...). regulariser, arguments: as in `nbkit.regularise`, of the accumulated edit of
    a sequence. relative_norm, seed: of noise, Gaussian on the output projection of every layer, whose norm is that
    share of the weight's own.

    MethodError for what does not belong together.
    """

    source: str
    way: str
    method: str = ""
    requests: tuple[EditRequest, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    regulariser: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    relative_norm: float | None = None
    seed: int = 0

    def __post_init__(self):
        check_text("source", self.source)
        with named(self):
            check_choice("way", self.way, WAYS)
            object.__setattr__(self, "requests", tuple(as_requests(self.requests)))
            if self.way == "noise":
                check_number("relative_norm", self.relative_norm, above=0)
                check_number("seed", self.seed, whole=True, least=0, below=2**63)
            elif not self.requests or (self.way == "single" and len(self.requests) > 1):
                raise MethodError(f"a {self.way} takes {'one request' if self.way == 'single' else 'requests'}, "
                                  f"not {len(self.requests)}")  # fmt: skip

    @cached_property
    def base(self) -> "Treatment":
        """The same before it is regularised."""
        return dataclasses.replace(self, regulariser=None, arguments={})

    @cached_property
    def key(self) -> str:
        """The digest of all that determines the edit, the model and the code apart."""
        return digest([getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "source"])

    @cached_property
    def draw(self) -> str:
        """What it shares with treatments that differ in how far it went only: the sequence, or the edit before it was
        regularised."""
        sequence = self.way == "sequence"
        return digest([self.way, self.method, self.settings, self.requests[: 1 if sequence else None],
                       self.relative_norm, self.seed])  # fmt: skip


@verb
def edits_of(
    lm: LanguageModel,
    treatments: Sequence[Treatment],
    made: MutableMapping[str, Edit] | None = None,
    progress: bool = True,
) -> list[Edit]:
    """One Edit a treatment, each of the model as it is, which is unchanged afterwards.

    What treatments share is computed once: single edits of a method with the same settings go side by side, a sequence
    is run once for all that stop within it, and one edit serves whatever it is regularised with.

    made: edits by `Treatment.key`, taken from there and put there. MethodError, which names the source, where one
    cannot be made.
    """
    treatments = check_treatments(treatments)
    made = {} if made is None else made
    wanted = {one.key: one for one in treatments if one.key not in made}
    bases = {one.base.key: one.base for one in wanted.values() if one.base.key not in made}
    with bar(len(bases), f"{lm.title}: treatments", "edit", progress, delay=0 if len(bases) > 1 else None) as shown:
        for together in _groups(list(bases.values())):
            with named(together[0]):
                made |= zip([one.key for one in together], _MAKE[together[0].way](lm, together), strict=True)
            shown.update(len(together))
    for key, one in wanted.items():
        if one.regulariser is not None:
            with named(one):
                made[key] = regularise(made[one.base.key], lm, one.regulariser, **one.arguments)
    return [made[one.key] for one in treatments]


def check_treatments(treatments: Any) -> list[Treatment]:
    """Treatments as a list; MethodError, by number, for what is none."""
    treatments = as_list("treatments", treatments, "Treatments", MethodError)
    for index, one in enumerate(treatments):
        if not isinstance(one, Treatment):
            raise MethodError(f"treatment {index} is no Treatment but {type(one).__name__}: {shown(one)}")
    return treatments


@contextmanager
def named(treatment: Treatment) -> Iterator[None]:
    """Within this `with`, an error says of which source it is."""
    try:
        yield
    except NbkitError as error:
        raise MethodError(f"{treatment.source}: {error}") from error
    except Exception as error:
        error.add_note(f"while the treatment {treatment.source!r} was made")
        raise


def _groups(bases: Sequence[Treatment]) -> list[list[Treatment]]:
    """Those that are computed together: single edits with the same settings, sequences that begin alike."""
    groups: dict[str, list[Treatment]] = {}
    for one in sorted(bases, key=lambda one: -len(one.requests)):
        shared = digest([one.way, one.method, one.settings])
        if one.way == "sequence":
            begun = [key for key, group in groups.items()
                     if key.startswith(shared) and group[0].requests[: len(one.requests)] == one.requests]  # fmt: skip
            shared = begun[0] if begun else shared + one.key
        groups.setdefault(shared if one.way in ("single", "sequence") else one.key, []).append(one)
    return list(groups.values())


def _single(lm: LanguageModel, together: Sequence[Treatment]) -> list[Edit]:
    first = together[0]
    return edit(lm, [one.requests[0] for one in together], first.method, progress=False, **first.settings)


def _batch(lm: LanguageModel, together: Sequence[Treatment]) -> list[Edit]:
    return [edit_batch(lm, one.requests, one.method, progress=False, **one.settings) for one in together]


def _sequence(lm: LanguageModel, together: Sequence[Treatment]) -> list[Edit]:
    """The edits so far, added up, wherever one of them stops; the first is the longest."""
    first, so_far, at = together[0], [], {}
    stops = {len(one.requests) for one in together}
    with closing(edit_sequence(lm, first.requests, first.method, progress=False, **first.settings)) as steps:
        for step in steps:
            so_far.append(step.edit)
            if len(so_far) in stops:
                at[len(so_far)] = accumulated(so_far)
    return [at[len(one.requests)] for one in together]


def _noise(lm: LanguageModel, together: Sequence[Treatment]) -> list[Edit]:
    return [noise(lm, one.relative_norm, one.seed) for one in together]


@verb
def noise(lm: LanguageModel, relative_norm: float, seed: int = 0) -> Edit:
    """Gaussian noise on the MLP's output projection W of every layer, of norm relative_norm · ‖W‖_F each.

    Drawn on the CPU, so that the same seed is the same noise on every device. The model is not changed.
    """
    check_number("relative_norm", relative_norm, above=0)
    generator, deltas = torch.Generator().manual_seed(int(seed)), {}
    for layer in range(lm.n_layers):
        weight = lm.oriented(lm.weight_name(layer)).detach()
        drawn = gaussian(weight.shape, relative_norm * float(weight.double().norm()), generator)
        deltas[lm.weight_name(layer)] = Dense(drawn.to(weight))
    made = Edit(deltas, (), "noise", {"relative_norm": relative_norm, "seed": seed})
    return dataclasses.replace(made, info={"update_norm": made.norm()})


_MAKE = {"single": _single, "batch": _batch, "sequence": _sequence, "noise": _noise}
