"""One request edited into each of several layers in turn: where does the edit take, and where does it break the model?

    for row in layer_sweep(lm, request, texts, layers=range(4), method="rome"):
        ...                                   # a row as soon as it is there; leaving the loop leaves the rest

The model is as it was between two rows and afterwards.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from nbkit.edits.door import in_use, verb
from nbkit.errors import MethodError
from nbkit.methods.hparams import hyper_parameters
from nbkit.methods.table import method_named
from nbkit.methods.verbs import SecondMomentLike, as_templates, edit
from nbkit.models.language_model import LanguageModel
from nbkit.records.requests import EditRequest
from nbkit.studies.metrics import edit_metrics, perplexity

MEASURED = ("efficacy_argmax", "target_probability", "paraphrase_argmax", "neighborhood_argmax")


@verb
def layer_sweep(
    lm: LanguageModel,
    request: EditRequest,
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    method: str = "rome",
    context_templates: Sequence[str] | None = None,
    second_moment: SecondMomentLike = None,
    **hparams: Any,
) -> Iterator[dict[str, Any]]:
    """A row a layer, in order: layer, the edit metrics of `MEASURED`, perplexity, perplexity_before, update_norm, and
    numerator and signed_denominator where the method has them.

    Args:
        layers: None for all. A method of several layers gets one of them at a time.
        second_moment: {layer: C} for methods that use one, or what `nbkit.edit` takes.

    The others as in `nbkit.edit`. MethodError for a method without layers, ModelError for a layer that does not exist,
    both at once.
    """
    names = {field.name for field in dataclasses.fields(method_named(method).parameters)}
    if not {"layer", "layers"} & names:
        raise MethodError(f"{method} is given no layer, so there is none to sweep over")
    layers = [lm.check_layer(layer) for layer in (range(lm.n_layers) if layers is None else layers)]
    where = [{"layer": layer} if "layer" in names else {"layers": (layer,)} for layer in layers]
    for each in where:
        hyper_parameters(lm, method, **{**hparams, **each})

    def rows() -> Iterator[dict[str, Any]]:
        with in_use(lm):
            templates = as_templates(lm, context_templates, method)
            before = perplexity(lm, texts)
        for layer, each in zip(layers, where, strict=True):
            with in_use(lm):
                settings = {**hparams, **each}
                made = edit(lm, [request], method, templates, second_moment, progress=False, **settings)
                measured = edit_metrics(lm, [request], edits=made).iloc[0]
                after = float(perplexity(lm, texts, edits=made)[0])
            info = {name: made[0].info.get(name) for name in ("numerator", "signed_denominator")}
            row = {"layer": layer, **{name: float(measured[name]) for name in MEASURED}}
            yield {**row, "perplexity": after, "perplexity_before": before, "update_norm": made[0].norm(), **info}

    return rows()
