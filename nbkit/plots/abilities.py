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
    ax.set_xlim(left=min(0.9, float(np.min(x)) * 0.9))
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


def weight_histogram(changes: Mapping[str, np.ndarray], ax: Axes, original: np.ndarray | None = None) -> Axes:
    """How large the numbers of each change of a weight are: shares of |ΔW| by size (log), a line a change.

    Args:
        changes: {name: ΔW}; numbers that are exactly zero have no place on a log axis, and the legend says their share.
        original: the weight itself, a dashed line.
    """
    drawn = dict(changes) | ({} if original is None else {"the weights themselves": original})
    sizes = {name: np.abs(np.asarray(change, float)).ravel() for name, change in drawn.items()}
    present = np.concatenate([size[np.isfinite(size) & (size > 0)] for size in sizes.values()])
    if not len(present):
        raise ValueError("no change of a weight is above zero, so there is no size to draw")
    low, high = np.quantile(present, 0.0005), present.max()  # the few that are nearly zero would fill the axis
    bins = np.geomspace(low, high * 1.01, 60)
    styles = group_styles(changes)
    for name, size in sizes.items():
        look = {"color": styles[name][0], "lw": 1.3} if name in styles else ORIGINAL
        zeros = f", {(size == 0).mean():.0%} zero" if (size == 0).any() else ""
        counts, _ = np.histogram(size, bins)
        middles = np.sqrt(bins[1:] * bins[:-1])
        ax.plot(middles, counts / len(size), label=f"{name} (median {np.median(size):.2g}{zeros})", **look)
    log_axis(ax.xaxis)
    ax.set(xlabel="|ΔW|, number by number", ylabel="Share of the numbers", ylim=(0, None))
    return legend_above(ax, ncols=1)
