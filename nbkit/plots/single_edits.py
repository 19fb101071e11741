"""Perplexity of many edited models, one point an edit: which edits break the model, and how many of them."""

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, MEDIAN, Edge, strips, unedited_line
from nbkit.plots.style import REFERENCE, columns, group_handles, group_styles, integer_axis, legend_above, percent_axis
from nbkit.records.collapse import Detection, shares


def perplexity_per_edit(
    frame: pd.DataFrame, ax: Axes, group: str = "subject_kind", ceiling: float | None = CEILING
) -> Axes:
    """One point per independently edited model: x the request, y its perplexity (log), colour the group.

    Args:
        frame: rows of `studies.single_edits`: perplexity, `group` and, for the dashed line, perplexity_before.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the top edge.
    """
    columns(frame, "perplexity", group)
    styles, edge = group_styles(frame[group]), Edge(frame["perplexity"], ceiling)
    numbers = np.arange(1, len(frame) + 1)
    for name, style in styles.items():
        of_group = (frame[group] == name).to_numpy()
        edge.points(ax, numbers[of_group], frame["perplexity"][of_group], style, ms=3, alpha=0.8)
    unedited = unedited_line(frame, ax.axhline, zorder=1)
    ax.set_ylabel("Perplexity")
    integer_axis(ax.xaxis)
    ax.set_xlabel("Edited model (request number)")
    legend_above(ax, group_handles(styles, frame[group]) + unedited + edge.finish(ax))
    return ax


def perplexity_strips(
    frame: pd.DataFrame, ax: Axes, by: str = "subject_kind", hue: str = "key_mode", ceiling: float | None = CEILING
) -> Axes:
    """Perplexities (log) as strips of points with their median: one place per `by`, one strip per `hue` in it.

    Compares variants of a method, for example ROME with C-ROME; arguments as in `perplexity_per_edit`.
    """
    columns(frame, "perplexity", by, hue)
    places, styles = list(dict.fromkeys(frame[by])), group_styles(frame[hue])
    edge, jitter, width = Edge(frame["perplexity"], ceiling), np.random.default_rng(0), 0.8 / len(styles)
    for at, place in enumerate(places):
        here = frame[frame[by] == place]
        for strip in strips(at, here["perplexity"], here[hue], styles, width, 0.3 * width, jitter):
            edge.points(ax, strip.places, strip.values, strip.style, ms=3, alpha=0.8)
            strip.median(ax, np.median(edge.place(strip.values)[0]), reach=0.4 * width, zorder=4)
    handles = [*group_handles(styles), Line2D([], [], label="median", **MEDIAN)]
    handles += unedited_line(frame, ax.axhline, zorder=1) + edge.finish(ax)
    counts = frame.groupby(by)[hue].value_counts().groupby(level=0).max()
    ax.set_xticks(range(len(places)), ["{}\n(n = {})".format(str(p).replace(" ", "\n", 1), counts[p]) for p in places])
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_ylabel("Perplexity")
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
    percent_axis(ax.xaxis)
    ax.set_xlabel(f"Edits that raise perplexity ≥ {ratio:g}×")
    return ax


def risk_roc(detections: Mapping[str, Detection], ax: Axes) -> Axes:
    """ROC curves: of the edits that collapsed, how many a score finds, against how many others it takes for such.

    Args:
        detections: {name of the score: `collapse.detection` of it}. One without both outcomes has no curve, and says
            so.
    """
    ax.plot([0, 1], [0, 1], label="chance", **REFERENCE)
    styles = group_styles(detections)
    dashes = itertools.cycle(["-", "--", "-.", ":"])  # curves may lie on each other
    for name, detection in detections.items():
        if np.isnan(detection.auc):
            label = f"{name}: {detection.collapsed} of {detection.n} collapse, no curve"
        else:
            label = f"{name}: AUC {detection.auc:.2f} [{detection.low:.2f}, {detection.high:.2f}]"
        curve = detection.curve
        ax.plot(curve["false_alarms"], curve["found"], color=styles[name][0], ls=next(dashes), label=label)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.set_xlabel("Normal edits taken for collapses")
    ax.set_ylabel("Collapses found")
    legend_above(ax, ncols=1)
    return ax
