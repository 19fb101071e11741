"""Editing methods side by side: whether the edits are there, and what they did to the rest of the model."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from scipy import stats

from nbkit.plots.style import (
    BLUE,
    CEILING,
    GREEN,
    GREY,
    ORANGE,
    at_edge,
    columns,
    edge_handle,
    edge_of,
    group_styles,
    legend_above,
    log_axis,
    mark_edge,
)  # fmt: skip

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
            ax.plot(mean, y, ls="none", marker=marker, color=colour, mew=0, ms=4, label=score if at == 0 else None)
    _rows(ax, names)
    ax.set_xlim(-0.03, 1.03)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlabel("Mean score")
    handles = [Line2D([], [], ls="none", marker=m, color=c, mew=0, label=s) for s, (c, m) in SCORES.items()]
    legend_above(ax, handles, ncols=3)
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
    edge, jitter = edge_of(frame["perplexity"], ceiling), np.random.default_rng(0)
    n_over = 0
    for at, name in enumerate(names):
        for i, (group, (colour, marker)) in enumerate(styles.items()):
            values = frame.loc[(frame[by] == name) & (frame[hue] == group), "perplexity"]
            x, over = at_edge(values, edge)
            y = at + (i - (len(styles) - 1) / 2) * 0.26 + jitter.uniform(-0.09, 0.09, len(x))
            ax.plot(x[~over], y[~over], ls="none", marker=marker, color=colour, alpha=0.5, mew=0, ms=2.6)
            mark_edge(ax, x[over], y[over], colour, marker=">")
            n_over += int(over.sum())
    before = float(frame["perplexity_before"].iloc[0])
    ax.axvline(before, color=GREY, ls="--", lw=0.8)
    log_axis(ax.xaxis)
    ax.set_xlabel("Perplexity after the edit")
    _rows(ax, names)
    handles = [Line2D([], [], ls="none", marker=m, color=c, mew=0, label=str(g)) for g, (c, m) in styles.items()]
    handles.append(Line2D([], [], color=GREY, ls="--", lw=0.8, label=f"unedited ({before:.3g})"))
    if n_over:
        handles.append(edge_handle(n_over, len(frame), edge, ceiling, marker=">"))
    legend_above(ax, handles)
    return ax


def _rows(ax: Axes, names: list) -> None:
    """One row a name, the first on top, told apart by faint bands."""
    for at in range(0, len(names), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="#f2f2f2", lw=0, zorder=0)
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
