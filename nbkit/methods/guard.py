"""The guard: edits that ordinary text would feel too much of are not returned as they are.

    edits = nbkit.edit(lm, requests, guard=nbkit.Guard(most=3.0))
    [edit.request for edit in edits if edit.info["guard"] == "refused"]

It looks at the update alone (keys/felt.py), so it costs next to nothing, and works for every method.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nbkit.edits.edit import Edit
from nbkit.errors import MethodError
from nbkit.keys.felt import Felt, felt_of, moments_of_text, projections
from nbkit.keys.moments import default_texts
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.methods.method import MethodSettings
from nbkit.methods.rome import rome
from nbkit.models.language_model import LanguageModel
from nbkit.records.bounds import Bounded, bounded, shown


@dataclass(frozen=True)
class Guard(Bounded):
    """What is done with an edit whose felt_relative (`nbkit.damage`) is above `most`, or is no number.

    most: how far the outputs of the edited MLP projections may move on ordinary text, √E‖ΔW k‖², over their size
    √E‖W k‖². W is the weight that the edit meets, in a sequence with the edits before it.
    instead: "refuse", or "C-ROME" for edits of ROME: they are made anew with key_mode "prefixed", and refused if that
    is above `most` too.
    second_moment: as in `damage`, of ordinary text. None: what the edit itself is given, or else of the unedited model
    on its default text.

    `most` has no default, because no number serves all methods and models. By `python data/miniworld damage --n 15`, of
    45 edits by ROME of miniworld-gpt2 those that raise perplexity 1.5-fold or more are felt from 4.7 on and all others
    up to 3.3 (tenfold: from 16.6 on), and by C-ROME and p-ROME none is felt above 3.5 and none rises so much. So for
    ROME `most=4` there: of 75 further edits it kept back all 22 that rise so much, and 3 more, by 1.27 or more. C-ROME
    instead passed in all 25, and made 2 of their new targets likelier than the true ones, where ROME did 20. But 15 of
    45 edits by KN and one by MEMIT rise so much at 0.28 to 0.65, where edits by others do no harm: to these it is
    blind. On miniworld-llama, where none is felt above 2.8, 4 of 315 rise 1.5-fold, by 1.6 at most. For a model of your
    own, `records.calibration.threshold` says what would have served edits that were measured.

    A refused edit is an Edit of the same requests without updates, and no exception: of a batch of many, those that
    are harmless shall not be lost with the one that is not, the list keeps one Edit a request, and whatever takes edits
    (`applied`, `perplexity`, `save_edits`, a study's rows) goes on, for that one with the model as it is, and has it on
    record.

    `Edit.info` gets guard ("passed", "fell back" or "refused"), guard_most, felt_relative (of the edit as it was asked
    for), felt_relative_instead (of the one by C-ROME, where one was made), guard_unmeasured (the weights that
    `damage` calls unmeasured, where there are any: the guard says nothing of these), and, of a refused one,
    refused_update_norm; its update_norm is then 0, all else what the method measured of the update that is not made.
    MethodError for anything that is no such guard, or another method than rome with "C-ROME".
    """

    most: float = bounded(above=0, most=math.inf, about="what an edit may be felt at most, relative to the outputs")
    instead: str = bounded("refuse", choices=("refuse", "C-ROME"), about="what is done with one that is felt more")
    second_moment: SecondMomentLike = dataclasses.field(default=None, compare=False, repr=False)


def guarding(
    lm: LanguageModel, guard: Guard | None, settings: MethodSettings, progress: bool = True
) -> Callable[[list[Edit], Callable[[Edit], Edit]], list[Edit]]:
    """(edits made with these settings, what regularises each) -> the edits that are returned; without a guard, all.

    They are regularised first, and so are those that are made anew.
    Raises at once what can be known before any edit: MethodError for a guard that cannot be meant, or has no text.
    """
    if guard is None:
        return lambda edits, regularised: [regularised(each) for each in edits]
    if not isinstance(guard, Guard):
        raise MethodError(f"guard must be a Guard, as nbkit.Guard(most=...), not {shown(guard)}")
    if guard.instead == "C-ROME" and settings.method != "rome":
        raise MethodError(f'instead="C-ROME" is for edits of rome, not of {settings.method}; use instead="refuse"')
    given = settings.second_moments if guard.second_moment is None and settings.second_moments else guard.second_moment
    if given is None:
        default_texts(lm, "the guard")
    else:
        given = SecondMoments.of(given, lm)
    for layer in getattr(settings.parameters, "layers", ()) if given is not None else ():
        given.matrix(layer)

    @cache
    def moments(*layers: int) -> SecondMoments:
        return moments_of_text(lm, given, layers, progress, "the guard")

    def felt(edits: Sequence[Edit]) -> list[Felt]:
        return felt_of(lm, edits, moments(*projections(lm, edits).values()))

    def judged(edits: list[Edit], regularised: Callable[[Edit], Edit]) -> list[Edit]:
        edits = [regularised(each) for each in edits]
        asked = felt(edits)
        about = [_about(guard, each) for each in asked]
        above = [place for place, each in enumerate(asked) if not each.relative <= guard.most]
        for place in set(range(len(edits))) - set(above):
            edits[place] = _with(edits[place], "passed", about[place])
        if above and guard.instead == "C-ROME" and settings.parameters.key_mode != "prefixed":
            prefixed = dataclasses.replace(settings.parameters, key_mode="prefixed")
            requests = [edits[place].request for place in above]
            anew = rome(lm, requests, dataclasses.replace(settings, parameters=prefixed))
            others = [regularised(each) for each in anew]
            for place, other, each in zip(above, others, felt(others), strict=True):
                about[place]["felt_relative_instead"] = each.relative
                if each.relative <= guard.most:
                    edits[place] = _with(other, "fell back", about[place])
        for place in above:
            if "guard" not in edits[place].info:
                edits[place] = _refused(edits[place], about[place])
        return edits

    return judged


def _about(guard: Guard, felt: Felt) -> dict[str, Any]:
    about = {"guard_most": guard.most, "felt_relative": felt.relative}
    return about | ({"guard_unmeasured": ", ".join(felt.unmeasured)} if felt.unmeasured else {})


def _with(edit: Edit, outcome: str, about: dict[str, Any]) -> Edit:
    return dataclasses.replace(edit, info={**edit.info, "guard": outcome, **about})


def _refused(edit: Edit, about: dict[str, Any]) -> Edit:
    about = {**about, "refused_update_norm": edit.norm(), "update_norm": 0.0}
    return _with(dataclasses.replace(edit, deltas={}), "refused", about)
