"""Edits of a fresh model each, one point an edit: which break the model, what foretells it, how methods compare."""

import itertools
from collections.abc import Collection, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, MEDIAN, Edge, strips, unedited_line, unedited_of
from nbkit.plots.style import (
    BLACK,
    ORANGE,
    PURPLE,
    REFERENCE,
    columns,
    group_handles,
    group_styles,
    integer_axis,
    legend_above,
    log_axis,
    percent_axis,
)
from nbkit.records.collapse import Detection, shares
from nbkit.records.intervals import student

PARTS = {"numerator": "numerator\n$\\|v^* - W k\\|$", "signed_denominator": "denominator\n$|k_u \\cdot u|$"}
SCORES = {"efficacy": (BLACK, "o"), "paraphrase": (PURPLE, "^"), "neighborhood": (ORANGE, "v")}  # of no group
ZSRE_SCORES = dict(zip(("reliability", "generalization", "locality"), SCORES.values(), strict=True))


def perplexity_per_edit(
    frame: pd.DataFrame, ax: Axes, group: str = "subject_kind", ceiling: float | None = CEILING
) -> Axes:
    """One point per independently edited model: x the request, y its perplexity (log), colour the group.

    Args:
        frame: rows of `studies.single_edits`: perplexity, `group` and, for the dashed line, perplexity_before.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the top edge.
    """
    columns(frame, "perplexity", group)
    styles, edge = group_styles(frame[group]), Edge(frame["perplexity"], ceiling, unedited=unedited_of(frame))
    numbers = np.arange(1, len(frame) + 1)
    for name, style in styles.items():
        of_group = (frame[group] == name).to_numpy()
        edge.points(ax, numbers[of_group], frame["perplexity"][of_group], style, ms=3, alpha=0.8)
    handles = group_handles(styles, frame[group]) + unedited_line(frame, ax.axhline, zorder=1) + edge.finish(ax)
    integer_axis(ax.xaxis, "auto", [1, 2, 5, 10])
    ax.set(xlabel="Edited model (request number)", ylabel="Perplexity")
    return legend_above(ax, handles)


def perplexity_strips(
    frame: pd.DataFrame, ax: Axes, by: str = "subject_kind", hue: str = "key_mode", ceiling: float | None = CEILING
) -> Axes:
    """Perplexities (log) as strips of points, their median beside them: one place per `by`, one strip per `hue` in it.

    Compares variants of a method, for example ROME with C-ROME; arguments as in `perplexity_per_edit`.
    """
    columns(frame, "perplexity", by, hue)
    styles, edge = group_styles(frame[hue]), Edge(frame["perplexity"], ceiling, unedited=unedited_of(frame))
    at_places, width = {name: rows for name, rows in frame.groupby(by, sort=False)}, 0.8 / len(styles)
    values = [(rows["perplexity"], rows[hue]) for rows in at_places.values()]
    for strip in strips(values, styles, width, spread=0.25 * width):
        edge.points(ax, strip.places, strip.values, strip.style, ms=3, alpha=0.8)
        median = np.median(edge.place(strip.values)[0])  # a bar over points that are all alike would hide them
        ax.plot([strip.middle + 0.32 * width, strip.middle + 0.48 * width], [median] * 2, **MEDIAN)
    handles = [*group_handles(styles), Line2D([], [], label="median", **MEDIAN)]
    handles += unedited_line(frame, ax.axhline, zorder=1) + edge.finish(ax)
    counts = [rows[hue].value_counts().max() for rows in at_places.values()]
    names = [str(name).replace(" ", "\n", 1) for name in at_places]
    ax.set_xticks(range(len(names)), [f"{name}\n(n = {n})" for name, n in zip(names, counts, strict=True)])
    ax.set(xlim=(-0.5, len(names) - 0.5), ylabel="Perplexity")
    return legend_above(ax, handles)


def perplexity_by_method(
    frame: pd.DataFrame, ax: Axes, by: str = "variant", hue: str = "subject_kind", ceiling: float | None = CEILING
) -> Axes:
    """Perplexity (log) of each edited model, a point, in one row a method; the dashed line is the unedited model.

    Args:
        frame: rows of `studies.single_edits` with a column `by`; perplexity, perplexity_before and `hue`.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the right edge.
    """
    columns(frame, "perplexity", "perplexity_before", by, hue)
    styles, edge = group_styles(frame[hue]), Edge(frame["perplexity"], ceiling, along="x", unedited=unedited_of(frame))
    of_methods = {name: (rows["perplexity"], rows[hue]) for name, rows in frame.groupby(by, sort=False)}
    for strip in strips(of_methods.values(), styles, width=0.26, spread=0.09):
        edge.points(ax, strip.places, strip.values, strip.style, ms=2.6, alpha=0.5)
    handles = group_handles(styles) + unedited_line(frame, ax.axvline) + edge.handles()
    log_axis(ax.xaxis)
    ax.set(xlabel="Perplexity after the edit")
    _rows(ax, of_methods)
    return legend_above(ax, handles)


def denominators(frame: pd.DataFrame, ax: Axes, group: str = "group") -> Axes:
    """Numerator and denominator of ROME's update (log), a strip of edits per group with its median written beside it.

    Both by their size; an open marker is a negative denominator, of which the tick label says how many there are.

    Args:
        frame: rows of `studies.single_edits`: numerator, signed_denominator and `group`. Values that are zero or not
            finite have no place on a log axis; the tick label counts them.
    """
    columns(frame, *PARTS, group)
    styles = group_styles(frame[group])
    drawn = {part: frame[np.isfinite(frame[part]) & (frame[part] != 0)] for part in PARTS}
    values, width = [(rows[part], rows[group]) for part, rows in drawn.items()], 0.8 / len(styles)
    for strip in strips(values, styles, width, spread=0.15 * width):
        (colour, marker), sizes, negative = strip.style, np.abs(strip.values), strip.values < 0
        look = {"ls": "none", "marker": marker, "color": colour}
        ax.plot(strip.places[~negative], sizes[~negative], ms=2.8, mew=0, alpha=0.55, **look)
        ax.plot(strip.places[negative], sizes[negative], ms=2.8, mew=0.6, mfc="none", alpha=0.8, **look)
        median = float(np.median(sizes))
        strip.median(ax, median, reach=0.22 * width)
        ax.annotate(f"{median:.3g}", (strip.middle + 0.25 * width, median), fontsize=7, va="center")
    notes = []
    for part, rows in drawn.items():
        n_negative, n_left_out = int((rows[part] < 0).sum()), len(frame) - len(rows)
        notes.append(f"\n({n_negative} negative, open)" if n_negative else "")
        notes[-1] += f"\n({n_left_out} not drawn: zero or not finite)" if n_left_out else ""
    log_axis(ax.yaxis)
    ax.set_xticks(range(len(PARTS)), [label + note for label, note in zip(PARTS.values(), notes, strict=True)])
    ax.set(xlim=(-0.5, len(PARTS) - 0.4), ylabel="Norm or absolute value")
    handles = [*group_handles(styles, frame[group]), Line2D([], [], label="median", **MEDIAN)]
    return legend_above(ax, handles)


def collapse_share(frame: pd.DataFrame, ax: Axes, ratio: float = 10.0, group: str = "subject_kind") -> Axes:
    """Per group, the share of edits that raise perplexity `ratio` times or more, with Wilson's 95 % interval.

    Args:
        frame: rows of `studies.single_edits`: perplexity, perplexity_before and `group`. Infinite and NaN perplexities
            count as collapsed.
    """
    columns(frame, "perplexity", "perplexity_before", group)
    table = shares(frame, ratio, by=group)
    styles = group_styles(table[group])
    for at, row in table.iterrows():
        ax.barh(at, row["share"], height=0.6, color=styles[row[group]][0], alpha=0.85)
        ax.plot([row["low"], row["high"]], [at, at], color="black", lw=1)
        end, label = (max(row["high"], row["share"]), at), f"{row['collapsed']} of {row['n']}"
        ax.annotate(label, end, (4, 0), va="center", textcoords="offset points", fontsize=7)
    ax.set_yticks(range(len(table)), table[group])
    ax.invert_yaxis()
    percent_axis(ax.xaxis)
    ax.set(xlim=(0, 1.2), xticks=[0, 0.25, 0.5, 0.75, 1], xlabel=f"Edits that raise perplexity ≥ {ratio:g}×")
    return ax


def collapse_by_templates(frame: pd.DataFrame, ax: Axes, ratio: float = 10.0, group: str = "group") -> Axes:
    """The share of edits that raise perplexity `ratio` times or more against the number of templates, by group.

    Args:
        frame: rows of `studies.single_edits` of several numbers of templates: perplexity, perplexity_before,
            n_templates and `group`. Bars are Wilson's 95 % intervals.
    """
    columns(frame, "perplexity", "perplexity_before", "n_templates", group)
    styles, numbers = group_styles(frame[group]), sorted(frame["n_templates"].unique())
    for i, (name, (colour, marker)) in enumerate(styles.items()):
        table = shares(frame[frame[group] == name], ratio, by="n_templates").sort_values("n_templates")
        at = np.searchsorted(numbers, table["n_templates"]) + (i - (len(styles) - 1) / 2) * 0.12  # side by side
        ax.vlines(at, table["low"], table["high"], color=colour, lw=0.9)
        n = "/".join(map(str, dict.fromkeys(table["n"])))
        ax.plot(at, table["share"], color=colour, marker=marker, mew=0, ms=4, lw=1, label=f"{name} (n = {n})")
    ax.set_xticks(range(len(numbers)), [f"{n:g}" for n in numbers])
    percent_axis(ax.yaxis)
    ax.set(ylim=(-0.03, 1.03), xlabel="Context templates", ylabel=f"Edits that raise\nperplexity ≥ {ratio:g}×")
    return legend_above(ax)


def risk_roc(detections: Mapping[str, Detection], ax: Axes) -> Axes:
    """ROC curves: of the edits that collapsed, how many a score finds, against how many others it takes for such.

    Args:
        detections: {name of the score: `collapse.detection` of it}. One without both outcomes has no curve, and says
            so.
    """
    ax.plot([0, 1], [0, 1], label="chance", **REFERENCE)
    styles = group_styles(detections)
    dashes = itertools.cycle(["-", "--", "-.", ":"])  # curves may lie on each other
    for name, (auc, low, high, collapsed, n, curve) in detections.items():
        quality = f"AUC {auc:.2f} [{low:.2f}, {high:.2f}]"
        label = f"{name}: " + (f"{collapsed} of {n} collapse, no curve" if np.isnan(auc) else quality)
        ax.plot(curve["false_alarms"], curve["found"], color=styles[name][0], ls=next(dashes), label=label)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set(xlabel="Normal edits taken for collapses", ylabel="Collapses found")
    return legend_above(ax, ncols=1)


def method_scores(
    frame: pd.DataFrame, ax: Axes, by: str = "variant", scores: Mapping[str, tuple[str, str]] = SCORES
) -> Axes:
    """Scores of each method, means with their 95 % intervals (Student's t), in rows.

    Args:
        frame: rows with a column `by` (of `studies.single_edits`, say), each of one request; a score that a request has
            not is left out.
        scores: {column: (colour, marker)}, three: efficacy, paraphrase, neighborhood (`SCORES`), or reliability,
            generalization, locality (`ZSRE_SCORES`).
    """
    columns(frame, by, *scores)
    of_methods = {name: rows for name, rows in frame.groupby(by, sort=False)}
    for i, (score, (colour, marker)) in enumerate(scores.items()):
        for at, rows in enumerate(of_methods.values()):
            found, y = student(rows[score]), at + (i - 1) * 0.22
            if found.low < found.high:
                ax.plot([max(found.low, 0), min(found.high, 1)], [y, y], color=colour, lw=0.9)
            if found.n:
                ax.plot(found.mean, y, ls="none", marker=marker, color=colour, mew=0, ms=4)
    _rows(ax, of_methods)
    percent_axis(ax.xaxis)
    ax.set(xlim=(-0.03, 1.03), xlabel="Mean score")
    return legend_above(ax, group_handles(scores), ncols=3)


def _rows(ax: Axes, names: Collection) -> None:
    """One row a name, the first on top, told apart by faint bands."""
    for at in range(0, len(names), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="#f2f2f2", lw=0, zorder=0)
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set(ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
