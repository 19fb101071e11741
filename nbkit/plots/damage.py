"""What was foretold of edits against what perplexity became: points with the calibration line, areas by method,
and what a guard made of them."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import Edge
from nbkit.plots.style import BLACK, REFERENCE, columns, group_handles, group_styles, legend_above, log_axis
from nbkit.records.calibration import Line
from nbkit.records.collapse import ratios

CEILING = 1e5  # times the unedited perplexity
LABELS = {
    "felt_relative": "Felt on ordinary text, $\\sqrt{E\\|\\Delta W k\\|^2 \\,/\\, E\\|W k\\|^2}$",
    "update_norm": "$\\|\\Delta W\\|$",
}


def damage_calibration(
    frame: pd.DataFrame,
    ax: Axes,
    line: Line | None = None,
    score: str = "felt_relative",
    by: str = "method",
    most: float | None = None,
    ceiling: float | None = CEILING,
) -> Axes:
    """How many times perplexity rose (log) against a score of each edit (log), one point an edited model.

    Args:
        frame: rows with perplexity, perplexity_before, `score` and `by`. Edits whose score is 0, infinite or NaN have
            no place on the axis; the legend counts them.
        line: of `records.calibration`, drawn over the scores that it is of; None or NaN draws none.
        most: a threshold of the score, a dashed line.
        ceiling: rises above it, infinite and NaN ones are hollow triangles at the top edge.
    """
    columns(frame, "perplexity", "perplexity_before", score, by)
    ratio, x = ratios(frame), frame[score].to_numpy(float)
    placed = np.isfinite(x) & (x > 0)
    styles, edge = group_styles(frame[by]), Edge(ratio, ceiling, unedited=None)
    for name, style in styles.items():
        of_group = placed & (frame[by] == name).to_numpy()
        edge.points(ax, x[of_group], ratio[of_group], style, ms=3.2, alpha=0.7)
    handles = group_handles(styles, frame[by])
    handles.append(ax.axhline(1.0, zorder=1, label="unedited", **REFERENCE))
    if line is not None and np.isfinite(line.slope) and placed.any():
        ends = np.array([x[placed].min(), x[placed].max()])
        label = f"slope {line.slope:.2f} [{line.slope_low:.2f}, {line.slope_high:.2f}], n = {line.n}"
        handles += ax.plot(ends, np.exp(line.intercept) * ends**line.slope, color=BLACK, lw=0.9, label=label)
    if most is not None:
        handles.append(ax.axvline(most, color=BLACK, ls=":", lw=0.9, label=f"guard's most ({most:g})"))
    handles += edge.finish(ax)
    if not placed.all():
        handles.append(Line2D([], [], ls="none", label=f"0 or no number, not drawn: {(~placed).sum()}"))
    log_axis(ax.xaxis)
    ax.set(xlabel=LABELS.get(score, score), ylabel="Perplexity after / before")
    return legend_above(ax, handles)


def areas_by_method(table: pd.DataFrame, ax: Axes, by: str = "method", score: str = "score") -> Axes:
    """How well each score tells the edits after which perplexity rises, method by method: areas with their intervals.

    Args:
        table: one row a method and score: `by`, `score`, auc, low, high, rising, n. Where no edit rises, or all do, the
            area is NaN and nothing is drawn; the label says how many rise.
    """
    columns(table, by, score, "auc", "low", "high", "rising", "n")
    methods, styles = list(dict.fromkeys(table[by])), group_styles(table[score])
    width = 0.7 / len(styles)
    for i, (name, (colour, marker)) in enumerate(styles.items()):
        rows = table[table[score] == name].set_index(by)
        at = np.array([methods.index(method) for method in rows.index]) + (i - (len(styles) - 1) / 2) * width
        ax.hlines(at, rows["low"], rows["high"], color=colour, lw=0.9)
        ax.plot(rows["auc"], at, ls="none", marker=marker, color=colour, mew=0, ms=4, label=name)
    counts = table.drop_duplicates(by).set_index(by)
    labels = [f"{method}, {counts.loc[method, 'rising']} of {counts.loc[method, 'n']} rise" for method in methods]
    for at in range(0, len(methods), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="#f2f2f2", lw=0, zorder=0)
    ax.set_yticks(range(len(methods)), labels)
    ax.tick_params(axis="y", length=0)
    ax.axvline(0.5, zorder=1, **REFERENCE)
    ax.set(ylim=(len(methods) - 0.5, -0.5), xlim=(-0.03, 1.03), xlabel="Area under the ROC curve")
    return legend_above(ax, ncols=len(styles))


def guard_outcomes(frame: pd.DataFrame, ax: Axes, by: str = "policy", ceiling: float | None = CEILING) -> Axes:
    """How many times perplexity rose (log) with each policy, one point an edit, coloured by what the guard did with it.

    Args:
        frame: rows of `records.guarding.guarded` of several policies: `by`, guard, perplexity, perplexity_before and
            efficacy, whose mean stands below. Rises above the ceiling, infinite and NaN ones are hollow triangles.
    """
    columns(frame, by, "guard", "perplexity", "perplexity_before", "efficacy")
    styles, edge = group_styles(frame["guard"]), Edge(ratios(frame), ceiling)
    labels, jitter = [], np.random.default_rng(0)
    for at, (name, rows) in enumerate(frame.groupby(by, sort=False)):
        places = at + jitter.uniform(-0.3, 0.3, len(rows))
        for outcome in rows["guard"].unique():
            of_outcome = (rows["guard"] == outcome).to_numpy()
            edge.points(ax, places[of_outcome], ratios(rows)[of_outcome], styles[outcome], ms=3.4, alpha=0.8)
        labels.append(f"{name}\n(n = {len(rows)})\nefficacy {rows['efficacy'].mean():.2f}")
    handles = [*group_handles(styles), ax.axhline(1.0, zorder=1, label="unedited", **REFERENCE), *edge.finish(ax)]
    ax.set_xticks(range(len(labels)), labels)
    ax.tick_params(axis="x", length=0)
    ax.set(xlim=(-0.5, len(labels) - 0.5), ylabel="Perplexity after / before")
    return legend_above(ax, handles)
