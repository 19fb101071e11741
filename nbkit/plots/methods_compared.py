"""Editing methods side by side: whether the edits are there, and what they did to the rest of the model."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from nbkit.plots.points import CEILING, Edge, strips, unedited_line
from nbkit.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    columns,
    group_handles,
    group_styles,
    legend_above,
    log_axis,
    percent_axis,
)

SCORES = {"efficacy": (BLUE, "o"), "paraphrase": (ORANGE, "s"), "neighborhood": (GREEN, "D")}


def method_scores(frame: pd.DataFrame, ax: Axes, by: str = "variant") -> Axes:
    """Efficacy, paraphrase and neighborhood of each method, means with their 95 % intervals (Student's t), in rows.

    Args:
        frame: rows of `studies.single_edits` with a column `by`; a score that a request has not is left out.
    """
    columns(frame, by, *SCORES)
    names = list(dict.fromkeys(frame[by]))
    for i, (score, (colour, marker)) in enumerate(SCORES.items()):
        for at, name in enumerate(names):
            values = frame.loc[frame[by] == name, score].dropna()
            if values.empty:
                continue
            y, mean = at + (i - 1) * 0.22, values.mean()
            if len(values) > 1 and values.std() > 0:
                low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
                ax.plot([max(low, 0), min(high, 1)], [y, y], color=colour, lw=0.9)
            ax.plot(mean, y, ls="none", marker=marker, color=colour, mew=0, ms=4)
    _rows(ax, names)
    ax.set_xlim(-0.03, 1.03)
    percent_axis(ax.xaxis)
    ax.set_xlabel("Mean score")
    legend_above(ax, group_handles(SCORES), ncols=3)
    return ax


def perplexity_by_method(
    frame: pd.DataFrame, ax: Axes, by: str = "variant", hue: str = "subject_kind", ceiling: float | None = CEILING
) -> Axes:
    """Perplexity (log) of each edited model, a point, in one row a method; the dashed line is the unedited model.

    Args:
        frame: rows of `studies.single_edits` with a column `by`; perplexity, perplexity_before and `hue`.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the right edge.
    """
    columns(frame, "perplexity", "perplexity_before", by, hue)
    names, styles = list(dict.fromkeys(frame[by])), group_styles(frame[hue])
    edge, jitter = Edge(frame["perplexity"], ceiling, along="x"), np.random.default_rng(0)
    for at, name in enumerate(names):
        here = frame[frame[by] == name]
        for strip in strips(at, here["perplexity"], here[hue], styles, width=0.26, spread=0.09, jitter=jitter):
            edge.points(ax, strip.places, strip.values, strip.style, ms=2.6, alpha=0.5)
    unedited = unedited_line(frame, ax.axvline)
    log_axis(ax.xaxis)
    ax.set_xlabel("Perplexity after the edit")
    _rows(ax, names)
    legend_above(ax, group_handles(styles) + unedited + edge.handles())
    return ax


def _rows(ax: Axes, names: list) -> None:
    """One row a name, the first on top, told apart by faint bands."""
    for at in range(0, len(names), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="#f2f2f2", lw=0, zorder=0)
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
