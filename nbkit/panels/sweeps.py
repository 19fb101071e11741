"""A sweep over layers: how its layers are written, and how it is shown, by a table and a figure that grow with it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from nbkit import plots
from nbkit.errors import MethodError
from nbkit.models.language_model import LanguageModel
from nbkit.panels import fragments
from nbkit.records.collapse import ratios

NAMES = {
    "efficacy_argmax": "said at the prompt",
    "target_probability": "target probability",
    "paraphrase_argmax": "said at paraphrases",
    "neighborhood_argmax": "neighbours said",
    "ratio": "perplexity, times",
    "update_norm": "‖ΔW‖",
    "signed_denominator": "signed denominator",
}


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `layer_sweep` as HTML."""
    if not rows:
        return fragments.note("No layer is done yet: press “Sweep over layers”.")
    frame = pd.DataFrame(rows)
    frame["ratio"] = ratios(frame)
    table = frame.set_index("layer")[list(NAMES)].rename(columns=NAMES).rename_axis(None)
    table.index = [f"layer {layer}" for layer in table.index]
    alt = "perplexity and target probability by layer"
    return fragments.table(table.astype(object), "One edit, layer by layer") + fragments.figure(figure(frame), alt)


def figure(frame: pd.DataFrame) -> Figure:
    """Perplexity and whether the edit takes, by layer."""
    with plots.paper_style():
        drawn = Figure(figsize=(plots.TWO_COLUMNS, 2.4), layout="constrained")
        left, right = drawn.subplots(1, 2)
        plots.ratio_by_layer(frame, left)
        plots.success_by_layer(frame, right)
    return drawn


def layers_in(text: str, lm: LanguageModel) -> list[int]:
    """Layers such as "0,2,4" or "0-3"; all where there is nothing. MethodError for other texts, ModelError for a layer
    that does not exist."""
    if not text.strip():
        return list(range(lm.n_layers))
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not first.isdigit() or (dash and not last.isdigit()):
            raise MethodError(f"layers are written 0,2,4 or 0-3, not {text!r}")
        layers += range(int(first), int(last or first) + 1)
    return [lm.check_layer(layer) for layer in dict.fromkeys(layers)]
