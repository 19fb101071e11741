"""Perplexity of many edited models, one point an edit: which edits break the model, and how many of them."""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nbkit.plots.style import (
    CEILING,
    GREY,
    at_edge,
    columns,
    edge_handle,
    edge_of,
    group_styles,
    legend_above,
    log_axis,
    mark_edge,
)
from nbkit.records.collapse import Detection, shares


def _baseline(frame: pd.DataFrame, ax: Axes) -> list:
    if "perplexity_before" not in frame:
        return []
    value = float(frame["perplexity_before"].iloc[0])
    return [ax.axhline(value, color=GREY, ls="--", lw=0.8, zorder=1, label=f"unedited ({value:.3g})")]


def _points(ax: Axes, x, values, edge: float, colour: str, marker: str) -> None:
    """Points, hollow triangles where the value is off the scale."""
    drawn, over = at_edge(values, edge)
    x = np.asarray(x, float)
    ax.plot(x[~over], drawn[~over], ls="none", marker=marker, color=colour, ms=3, mew=0, alpha=0.8, zorder=2)
    mark_edge(ax, x[over], drawn[over], colour)


def _finish(frame: pd.DataFrame, ax: Axes, edge: float, ceiling: float | None) -> list:
    """The log axis, its upper end at the edge if values are drawn there, and their legend entry."""
    ax.set_ylabel("Perplexity")
    ax.set_yscale("log")
    n_over = int(at_edge(frame["perplexity"], edge)[1].sum())
    if n_over:
        ax.set_ylim(top=edge * 1.15)
    log_axis(ax.yaxis)
    return [edge_handle(n_over, len(frame), edge, ceiling)] if n_over else []


def perplexity_per_edit(
    frame: pd.DataFrame, ax: Axes, group: str = "subject_kind", ceiling: float | None = CEILING
) -> Axes:
    """One point per independently edited model: x the request, y its perplexity (log), colour the group.

    Args:
        frame: rows of `studies.single_edits`: perplexity, `group` and, for the dashed line, perplexity_before.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the top edge.
    """
    columns(frame, "perplexity", group)
    edge = edge_of(frame["perplexity"], ceiling)
    x = np.arange(1, len(frame) + 1)
    handles = []
    for name, (colour, marker) in group_styles(frame[group]).items():
        of_group = (frame[group] == name).to_numpy()
        _points(ax, x[of_group], frame["perplexity"][of_group], edge, colour, marker)
        label = f"{name} (n = {of_group.sum()})"
        handles.append(Line2D([], [], ls="none", marker=marker, color=colour, mew=0, label=label))
    handles += _baseline(frame, ax) + _finish(frame, ax, edge, ceiling)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("Edited model (request number)")
    legend_above(ax, handles)
    return ax


def perplexity_strips(
    frame: pd.DataFrame, ax: Axes, by: str = "subject_kind", hue: str = "key_mode", ceiling: float | None = CEILING
) -> Axes:
    """Perplexities (log) as strips of points with their median: one place per `by`, one strip per `hue` in it.

    Compares variants of a method, for example ROME with C-ROME; arguments as in `perplexity_per_edit`.
    """
    columns(frame, "perplexity", by, hue)
    edge = edge_of(frame["perplexity"], ceiling)
    places, styles = list(dict.fromkeys(frame[by])), group_styles(frame[hue])
    jitter = np.random.default_rng(0)
    for at, place in enumerate(places):
        for i, (name, (colour, marker)) in enumerate(styles.items()):
            values = frame.loc[(frame[by] == place) & (frame[hue] == name), "perplexity"]
            if values.empty:
                continue
            width = 0.8 / len(styles)
            middle = at + (i - (len(styles) - 1) / 2) * width
            _points(ax, middle + jitter.uniform(-0.3, 0.3, len(values)) * width, values, edge, colour, marker)
            median = np.median(at_edge(values, edge)[0])
            ax.plot([middle - 0.4 * width, middle + 0.4 * width], [median] * 2, color="black", lw=1.4, zorder=4)
    handles = [
        Line2D([], [], ls="none", marker=marker, color=colour, mew=0, label=str(name))
        for name, (colour, marker) in styles.items()
    ]
    handles.append(Line2D([], [], color="black", lw=1.4, label="median"))
    handles += _baseline(frame, ax) + _finish(frame, ax, edge, ceiling)
    counts = frame.groupby(by)[hue].value_counts().groupby(level=0).max()
    ax.set_xticks(range(len(places)), ["{}\n(n = {})".format(str(p).replace(" ", "\n", 1), counts[p]) for p in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    legend_above(ax, handles)
    return ax


def collapse_share(frame: pd.DataFrame, ax: Axes, ratio: float = 10.0, group: str = "subject_kind") -> Axes:
    """Per group, the share of edits that raise perplexity `ratio` times or more, with Wilson's 95 % interval.

    Args:
        frame: rows of `studies.single_edits`: perplexity, perplexity_before and `group`. Infinite and NaN perplexities
            count as collapsed.
    """
    columns(frame, "perplexity", "perplexity_before", group)
    table = shares(frame, ratio, by=group)
    names = table[group].tolist()
    for at, row in table.iterrows():
        colour = group_styles(names)[row[group]][0]
        ax.barh(at, row["share"], height=0.6, color=colour, alpha=0.85)
        ax.plot([row["low"], row["high"]], [at, at], color="black", lw=1)
        label = f"{row['collapsed']} of {row['n']}"
        ax.annotate(label, (max(row["high"], row["share"]), at), (4, 0), va="center", textcoords="offset points",
                    fontsize=7)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.2)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlabel(f"Edits that raise perplexity ≥ {ratio:g}×")
    return ax


def risk_roc(detections: Mapping[str, Detection], ax: Axes) -> Axes:
    """ROC curves: of the edits that collapsed, how many a score finds, against how many others it takes for such.

    Args:
        detections: {name of the score: `collapse.detection` of it}. One without both outcomes has no curve, and says
            so.
    """
    ax.plot([0, 1], [0, 1], color=GREY, ls="--", lw=0.8, label="chance")
    styles = group_styles(detections)
    dashes = itertools.cycle(["-", "--", "-.", ":"])  # curves may lie on each other
    for name, found in detections.items():
        if np.isnan(found.auc):
            label = f"{name}: {found.collapsed} of {found.n} collapse, no curve"
        else:
            label = f"{name}: AUC {found.auc:.2f} [{found.low:.2f}, {found.high:.2f}]"
        ax.plot(found.curve["false_alarms"], found.curve["found"], color=styles[name][0], ls=next(dashes),
                label=label)  # fmt: skip
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.set_xlabel("Normal edits taken for collapses")
    ax.set_ylabel("Collapses found")
    legend_above(ax, ncols=1)
    return ax
