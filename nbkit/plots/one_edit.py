"""One edit seen from inside: how its value was found, what it does to the next token, which key it uses."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbkit.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    REFERENCE,
    SKY,
    VERMILION,
    columns,
    integer_axis,
    legend_above,
    log_axis,
)
from nbkit.records.collapse import ratios

LOSS_PARTS = {"nll": "new target (NLL)", "kl": "essence (KL)", "weight_decay": "size of the change"}


def loss_curve(frame: pd.DataFrame, ax: Axes, threshold: float | None = 0.05) -> Axes:
    """The loss of v* over the optimisation's steps, its three parts stacked.

    Args:
        frame: one row a step: step, nll, kl, weight_decay (nats, already weighted, so that they add up to the loss).
        threshold: where the search stops early, as a dashed line; None for no line.
    """
    columns(frame, "step", *LOSS_PARTS)
    parts, look = frame[list(LOSS_PARTS)], {"colors": [BLUE, ORANGE, GREEN], "alpha": 0.75, "lw": 0}
    ax.stackplot(frame["step"], parts.T, labels=LOSS_PARTS.values(), **look)
    ax.plot(frame["step"], parts.sum(axis=1, skipna=False), color=BLACK, lw=1, label="total")
    if threshold is not None:
        ax.axhline(threshold, label=f"stop below {threshold:g}", **REFERENCE)
    ax.set(xlim=(frame["step"].min(), frame["step"].max()), ylim=(0, None))
    ax.set(xlabel="Optimisation step", ylabel="Loss of $v^*$ (nats)")
    integer_axis(ax.xaxis, "auto", [1, 2, 5, 10])
    return legend_above(ax)


def _plain_text(text: str, most: int = 30) -> str:
    """A label with its blanks visible, no mathematics in it, and not too long."""
    text = text.replace("$", r"\$").replace("\n", "⏎")
    text = "␣" + text[1:] if text.startswith(" ") else text
    return text if len(text) <= most else text[: most - 6] + "…" + text[-5:]


def top_tokens(frame: pd.DataFrame, ax: Axes, target: str | None = None) -> Axes:
    """Probabilities of next tokens before and after an edit, as pairs of bars, the likeliest on top.

    Args:
        frame: token, before, after (probabilities between 0 and 1); drawn in this order.
        target: the token whose label is set in bold.
    """
    columns(frame, "token", "before", "after")
    at = np.arange(len(frame))
    ax.barh(at - 0.2, frame["before"], height=0.38, color=SKY, label="before")
    ax.barh(at + 0.2, frame["after"], height=0.38, color=VERMILION, label="after")
    ax.set_yticks(at, [_plain_text(token) for token in frame["token"]])
    for label, token in zip(ax.get_yticklabels(), frame["token"], strict=True):
        label.set_fontweight("bold" if token == target else "normal")
    ax.invert_yaxis()
    ax.set(xlim=(0, 1), xlabel="Next-token probability")
    return legend_above(ax)


def template_similarity(frame: pd.DataFrame, ax: Axes) -> Axes:
    """The cosine similarity of each template's key to the plain key, one dot a template.

    Args:
        frame: template (text with {} for the prompt), similarity; drawn in this order from the top.
    """
    columns(frame, "template", "similarity")
    at = np.arange(len(frame))
    ax.hlines(at, 0, frame["similarity"], color=GREY, lw=0.6)
    ax.plot(frame["similarity"], at, ls="none", marker="o", color=BLUE, ms=3.5, clip_on=False)
    ax.set_yticks(at, [_plain_text(template) for template in frame["template"]])
    ax.invert_yaxis()
    ax.set(xlim=(min(0.0, float(frame["similarity"].min()) - 0.05), 1.03), xlabel="Cosine to the plain key")
    return ax


def one_edit_panels(
    similar: pd.DataFrame,
    losses: pd.DataFrame,
    said: Mapping[str, pd.DataFrame],
    axes,
    target: str | None = None,
    threshold: float | None = 0.05,
) -> np.ndarray:
    """A row of panels about one edit: the cosines of its key, its search for v*, and its next tokens at each place.

    Args:
        similar: similarity, of the empty template first; what the others say is not shown.
        losses, threshold: as for `loss_curve`.
        said: {where it was asked: as for `top_tokens`}; a panel for each. target: as there.
        axes: 2 + len(said) of them.
    """
    cosine, search, *tokens = axes
    template_similarity(similar.assign(template=""), cosine)
    ends = {0: "plain", len(similar) - 1: f"prefix {len(similar) - 1}"} if len(similar) > 1 else {0: "plain"}
    cosine.set_yticks(list(ends), list(ends.values()))
    loss_curve(losses, search, threshold)
    for ax, (where, frame) in zip(tokens, said.items(), strict=True):
        top_tokens(frame, ax, target).set_xlabel(f"Probability,\n{where}")
    return np.asarray(axes)


def ratio_by_layer(frame: pd.DataFrame, ax: Axes, collapse_ratio: float = 10.0) -> Axes:
    """How many times perplexity rises when one request is edited into each layer; NaN and infinity at the top edge.

    Args:
        frame: one row a layer: layer, perplexity, perplexity_before.
        collapse_ratio: where an edit counts as a collapse, as a dashed line.
    """
    columns(frame, "layer", "perplexity", "perplexity_before")
    rise = ratios(frame)
    top = 10 * max(rise[np.isfinite(rise)].max() if np.isfinite(rise).any() else 1.0, collapse_ratio)
    ax.plot(frame["layer"], rise.clip(upper=top), marker="o", color=VERMILION, ms=4)
    ax.axhline(collapse_ratio, **REFERENCE)
    ax.set(xlabel="Layer", ylabel="Perplexity,\ntimes the unedited")
    log_axis(ax.yaxis)
    integer_axis(ax.xaxis)
    return ax


def success_by_layer(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Whether an edit takes, and what it leaves alone, by layer.

    Args:
        frame: one row a layer: layer, target_probability, paraphrase_argmax, neighborhood_argmax (shares; NaN where a
            request has none).
    """
    looks = {
        "target_probability": ("target probability", BLUE, "o"),
        "paraphrase_argmax": ("said at paraphrases", GREEN, "s"),
        "neighborhood_argmax": ("neighbours said", ORANGE, "D"),
    }
    columns(frame, "layer", *looks)
    for name, (label, colour, marker) in looks.items():
        ax.plot(frame["layer"], frame[name], marker=marker, color=colour, ms=4, label=label)
    ax.set(xlabel="Layer", ylabel="Share or probability", ylim=(-0.04, 1.04))
    integer_axis(ax.xaxis)
    return legend_above(ax)
