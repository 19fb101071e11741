"""What ordinary text feels of an edit, without a forward pass: √E‖ΔW k‖² over the keys k that second moments are of.

    moments = moments_of_text(lm, None, projections(lm, edits).values())
    felt = felt_of(lm, edits, moments)[0]
    felt.absolute, felt.relative, felt.unmeasured

Second moments are not centred, so of what is added whatever the key is, as of biases, they say nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nbkit.edits.edit import Edit
from nbkit.edits.overlays import unedited
from nbkit.edits.updates import Dense, felt_norms
from nbkit.keys.moments import default_second_moments
from nbkit.keys.solving import SecondMomentLike, SecondMoments
from nbkit.models.edited import layer_of
from nbkit.models.language_model import LanguageModel


@dataclass(frozen=True)
class Felt:
    """Of one edit, both in quadrature over the MLP projections W that it changes; 0 for an edit without updates.

    absolute: √E‖ΔW k‖², how much their outputs move. relative: that over √E‖W k‖², how large the outputs are, each
    projection by its own: beside one whose outputs are large (the first layer's or the last's may be a hundred times
    others') what another feels would vanish. unmeasured: the weights of the edit that are no MLP projection, whose
    effect is in neither; both are NaN if it has no others.
    """

    absolute: float
    relative: float
    unmeasured: tuple[str, ...] = ()


def projections(lm: LanguageModel, edits: Sequence[Edit]) -> dict[str, int]:
    """{weight name: layer} of the MLP projections that the edits change, by layer. ModelError for an edit that does
    not fit the model."""
    layers = {}
    for edit in edits:
        for name, delta in edit.deltas.items():
            lm.weight_of(name, delta)
            layers.setdefault(name, layer_of(lm, name))
    path = lm.architecture.projection_path
    found = {name: layer for name, layer in layers.items() if layer is not None and name == f"{path(layer)}.weight"}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def moments_of_text(
    lm: LanguageModel, given: SecondMomentLike, layers: Iterable[int], progress: bool = True, who: str = "damage"
) -> SecondMoments:
    """What is given, or else those of the unedited model on its default text, cached.

    MethodError, which says who needs them, for a model that has no such text.
    """
    layers = list(layers)
    if given is None and layers:
        with unedited(lm):
            given = default_second_moments(lm, layers, progress, who)
    return SecondMoments.of(given, lm)


def felt_of(lm: LanguageModel, edits: Sequence[Edit], moments: SecondMoments) -> list[Felt]:
    """What is felt of each edit, by moments of all layers that one changes. W is what is in the model now.

    No forward pass; the model is not changed. What is NaN or infinite in an update makes both NaN or infinite.
    """
    layers = projections(lm, edits)
    squares = [[0.0, 0.0] for _ in edits]  # absolute, relative
    for name, layer in layers.items():
        places = [place for place, edit in enumerate(edits) if name in edit.deltas]
        moment = moments.matrix(layer)
        output = Dense(lm.oriented(name)).felt_norm(moment)
        felt = felt_norms([edits[place].deltas[name] for place in places], moment)
        for place, absolute in zip(places, felt, strict=True):
            share = absolute / output if output else absolute * math.inf if absolute else 0.0
            squares[place][0] += absolute * absolute  # a float to the power of 2 raises where it overflows
            squares[place][1] += share * share
    found = []
    for edit, square in zip(edits, squares, strict=True):
        unmeasured = tuple(name for name in edit.deltas if name not in layers)
        known = not unmeasured or len(unmeasured) < len(edit.deltas)
        found.append(Felt(*(math.sqrt(value) if known else math.nan for value in square), unmeasured))
    return found
