"""A model on its way, and its siblings trained otherwise: one point a training, at its step or its dose.

The points of one group at one place are trainings of different seeds; the line goes through their means. Frames have a
column `seed` beside those that a function names.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbkit.plots.style import (
    GREY,
    columns,
    group_handles,
    group_styles,
    integer_axis,
    label_panels,
    legend_above,
    percent_axis,
)
from nbkit.records.collapse import shares

AXES = {"step": "Training step", "opening": "Windows that open as prompts do"}  # all others are named as they are


def collapse_over(
    frame: pd.DataFrame, ax: Axes, x: str = "step", group: str = "subject_kind", ratio: float = 10.0
) -> Axes:
    """The share of edits that raise perplexity `ratio` times or more, with Wilson's 95 % interval at each point.

    Args:
        frame: one row an edit: perplexity, perplexity_before, `x`, `group`.
        x: "step", or another number of the training such as "opening", whose values stand side by side.
    """
    columns(frame, "perplexity", "perplexity_before", x, "seed", group)
    table = shares(frame, ratio, by=[x, "seed", group]).rename(columns={"share": "middle"})
    percent_axis(ax.yaxis)
    ax.set(ylim=(-0.04, 1.04), ylabel=f"Edits that raise\nperplexity ≥ {ratio:g}×")
    return _points(table, ax, x, group)


def median_over(frame: pd.DataFrame, ax: Axes, y: str, x: str = "step", group: str = "subject_kind") -> Axes:
    """The median of `y` over a training's rows, with a bar over their middle half; arguments as in `collapse_over`."""
    columns(frame, y, x, "seed", group)
    quartiles = frame.groupby([x, "seed", group], sort=False)[y].quantile([0.25, 0.5, 0.75]).unstack()
    table = quartiles.set_axis(["low", "middle", "high"], axis=1).reset_index()
    ax.axhline(0, color=GREY, lw=0.5, zorder=0)
    ax.set_ylabel(y)
    return _points(table, ax, x, group)


def value_over(frame: pd.DataFrame, ax: Axes, y: str, x: str = "step", group: str = "subject_kind") -> Axes:
    """One value of each training, a point without a bar; arguments as in `collapse_over`.

    ValueError for a frame with several rows of one group, seed and `x`.
    """
    columns(frame, y, x, "seed", group)
    if frame.duplicated([x, "seed", group]).any():
        raise ValueError(f"the frame has several rows of one {x}, seed and {group}: choose some of them")
    ax.set_ylabel(y)
    return _points(frame.rename(columns={y: "middle"}).assign(low=np.nan, high=np.nan), ax, x, group)


def training_panels(
    edits: pd.DataFrame, alike: pd.DataFrame, known: pd.DataFrame, axes, x: str = "step", ratio: float = 10.0
) -> np.ndarray:
    """Four panels of one x: collapses, signed denominators, similarities of keys, and what the model knows.

    Args:
        edits: one row an edit, as for `collapse_over` by `group`, with signed_denominator.
        alike: group, similarity. known: group, recall. One row a training and group, as for `value_over`.
        axes: four of them.
    """
    axes = np.asarray(axes)
    collapsing, denominator, similarity, recall = axes.flat
    collapse_over(edits, collapsing, x, "group", ratio)
    median_over(edits, denominator, "signed_denominator", x, "group").set_ylabel("Signed denominator")
    value_over(alike, similarity, "similarity", x, "group").set_ylabel("Cosine of keys")
    value_over(known, recall, "recall", x, "group").set(ylabel="Facts recalled", ylim=(-0.04, 1.04))
    percent_axis(recall.yaxis)
    label_panels(axes.flat)
    return axes


def _points(table: pd.DataFrame, ax: Axes, x: str, group: str) -> Axes:
    """Points (x, middle) with bars from low to high by group and seed, groups and seeds moved apart."""
    styles, seeds, place_of = group_styles(table[group]), sorted(set(table["seed"])), _places(table[x], ax, x)
    for number, (name, (colour, marker)) in enumerate(styles.items()):
        of_group = table[table[group] == name]
        aside = number - (len(styles) - 1) / 2
        means = of_group.groupby(x)["middle"].mean()
        ax.plot([place_of(value, aside) for value in means.index], means, color=colour, lw=0.9, alpha=0.7)
        for row in of_group.to_dict("records"):
            place = place_of(row[x], aside + 0.5 * (seeds.index(row["seed"]) - (len(seeds) - 1) / 2))
            ax.plot([place] * 2, [row["low"], row["high"]], color=colour, lw=0.8)
            ax.plot(place, row["middle"], ls="none", marker=marker, color=colour, ms=3.2, mew=0)
    ax.set_xlabel(AXES.get(x, x))
    return legend_above(ax, group_handles(styles))


def _places(values: pd.Series, ax: Axes, x: str) -> Callable[[float, float], float]:
    """Where a value stands on the x axis, so far aside; steps keep their distances, doses stand side by side."""
    if x == "step":
        width = 0.012 * float(values.max())
        integer_axis(ax.xaxis, 6, [1, 2, 5, 10])
        return lambda value, aside: value + aside * width
    doses = sorted(set(values))
    ax.set_xticks(range(len(doses)), [f"{dose:.3g}" for dose in doses])
    ax.set_xlim(-0.5, len(doses) - 0.5)
    return lambda value, aside: doses.index(value) + aside * 0.16
