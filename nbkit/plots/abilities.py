"""Perplexity against what an edited model still does, and the weights that edits changed."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, Edge
from nbkit.plots.style import (
    BLACK,
    GREY,
    REFERENCE,
    columns,
    group_handles,
    group_styles,
    integer_axis,
    legend_above,
    log_axis,
)

DECADES = 1e5  # how far below the largest number sizes are shown
ORIGINAL = {"color": GREY, "ls": "--", "lw": 1.0}


def perplexity_vs_ability(
    frame: pd.DataFrame, ax: Axes, group: str = "method", ratio: float = 10.0, ceiling: float | None = CEILING
) -> Axes:
    """One point an edited model: how many times its perplexity has risen (log) against the tasks that it retains.

    A line reaches down to the task that has lost most; a ring marks edits that break the tasks.

    Args:
        frame: rows of `ability.retained` with a column ratio: retained, least, breaks_tasks, and `group`.
        ratio: the perplexity that counts as a collapse, a dashed line.
        ceiling: ratios above it, and infinite or NaN ones, are hollow triangles at the right edge.
    """
    columns(frame, "ratio", "retained", "least", "breaks_tasks", group)
    styles, edge = group_styles(frame[group]), Edge(frame["ratio"], ceiling, along="x")
    x, _ = edge.place(frame["ratio"])
    ax.vlines(x, frame["least"], frame["retained"], color=GREY, lw=0.6, alpha=0.6, zorder=1)
    for name, style in styles.items():
        of_group = (frame[group] == name).to_numpy()
        edge.points(ax, frame["retained"].to_numpy(float)[of_group], frame["ratio"][of_group], style, ms=4, alpha=0.8)
    broken = frame["breaks_tasks"].to_numpy(bool)
    ring = {"ls": "none", "marker": "o", "mfc": "none", "mec": BLACK, "mew": 0.7, "ms": 8}
    ax.plot(x[broken], frame["retained"].to_numpy(float)[broken], zorder=4, **ring)
    handles = group_handles(styles)
    handles.append(Line2D([], [], label="a task has lost half", **ring))
    handles.append(Line2D([], [], color=GREY, lw=0.6, label="down to the task that lost most"))
    handles.append(ax.axvline(ratio, zorder=0, label=f"perplexity {ratio:g}×", **REFERENCE))
    for level in (0, 1):
        ax.axhline(level, color=GREY, lw=0.5, zorder=0)
    handles += edge.finish(ax)
    log_axis(ax.xaxis)
    ax.set(xlabel="Perplexity, times the unedited", ylabel="Tasks retained\n(1: unharmed, 0: guessing)")
    return legend_above(ax, handles)


def weight_map(change: np.ndarray, ax: Axes, low: float, high: float) -> AxesImage:
    """|ΔW| of one weight as a map, its colours on a log scale from `low` (and less) to `high` (and more).

    Args:
        change: (d_out, d_in).

    Returns the image, for a colour bar that several maps share.
    """
    size = np.clip(np.abs(np.asarray(change, float)), low, high)
    image = ax.imshow(size, norm=LogNorm(low, high), cmap="magma", aspect="auto", interpolation="nearest")
    for axis in (ax.xaxis, ax.yaxis):
        integer_axis(axis, 4)
    ax.set(xlabel="Input (d_mlp)", ylabel="Output (d_model)")
    return image


def weights_above(changes: Mapping[str, np.ndarray], ax: Axes, original: np.ndarray | None = None) -> Axes:
    """How large the numbers of each change of a weight are: the share of them above a size (both log), a line a change.

    Args:
        changes: {name: ΔW}.
        original: the weight itself, a dashed line.
    """
    drawn = dict(changes) | ({} if original is None else {"the weights themselves": original})
    sizes = {name: np.sort(np.abs(np.asarray(change, float)).ravel()) for name, change in drawn.items()}
    largest = max(size[-1] for size in sizes.values())
    if not largest > 0:
        raise ValueError("no change of a weight is above zero, so there is no size to draw")
    places, styles = np.geomspace(largest / DECADES, largest, 400), group_styles(changes)
    for name, size in sizes.items():
        look = {"color": styles[name][0], "lw": 1.3} if name in styles else ORIGINAL
        share = 1 - np.searchsorted(size, places, side="right") / len(size)
        ax.plot(places[share > 0], share[share > 0], label=f"{name} (largest {size[-1]:.2g})", **look)
    for axis in (ax.xaxis, ax.yaxis):
        log_axis(axis)
    ax.set(xlabel="|ΔW|, number by number", ylabel="Share of the numbers above")
    return legend_above(ax)
