"""What edits gain against what they cost: points of method and regulariser with the front of the best ones."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.style import BLACK, GREY, columns, group_styles, legend_above, percent_axis
from nbkit.records.intervals import student
from nbkit.records.pareto import front

MARKERS = "osD^vPX*<>hp"
LABELS = {"ability": "Ability kept (mean over tasks)", "worst": "Ability kept (worst task)"}


def pareto_front(frame: pd.DataFrame, ax: Axes, x: str = "ability", y: str = "reliability") -> Axes:
    """One point a method (colour) and regulariser (shape), means over the rows with 95 % intervals (Student's t).

    Points on the Pareto front, which no other one beats in both values, are filled and joined by steps: what lies below
    and left of them is beaten.

    Args:
        frame: method, regulariser, `x` and `y`, one row an order; ability is of `records.ability.with_ability`.
    """
    columns(frame, "method", "regulariser", x, y)
    groups = {name: (student(rows[x]), student(rows[y]))
              for name, rows in frame.groupby(["method", "regulariser"], sort=False)}  # fmt: skip
    methods, regularisers = group_styles(frame["method"]), list(dict.fromkeys(frame["regulariser"]))
    if len(regularisers) > len(MARKERS):
        raise ValueError(f"{len(regularisers)} regularisers cannot be told apart: {len(MARKERS)} at most")
    shapes = dict(zip(regularisers, MARKERS, strict=False))
    best = front([of_x.mean for of_x, _ in groups.values()], [of_y.mean for _, of_y in groups.values()])
    for ((method, regulariser), (of_x, of_y)), is_best in zip(groups.items(), best, strict=True):
        colour = methods[method][0]
        ax.plot([of_x.low, of_x.high], [of_y.mean] * 2, color=colour, lw=0.7, alpha=0.6)
        ax.plot([of_x.mean] * 2, [of_y.low, of_y.high], color=colour, lw=0.7, alpha=0.6)
        look = {"marker": shapes[regulariser], "mec": colour, "mfc": colour if is_best else "white", "ms": 4.5}
        ax.plot(of_x.mean, of_y.mean, ls="none", zorder=3, **look)
    chosen = sorted(
        (of_x.mean, of_y.mean) for (of_x, of_y), is_best in zip(groups.values(), best, strict=True) if is_best
    )
    if chosen:
        ax.plot(*zip(*chosen, strict=True), color=BLACK, lw=0.9, drawstyle="steps-pre", zorder=1)
    for axis in (ax.xaxis, ax.yaxis):
        percent_axis(axis)
    ax.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y.capitalize()))
    handles = [Line2D([], [], color=colour, lw=2, label=str(name)) for name, (colour, _) in methods.items()]
    handles += [Line2D([], [], ls="none", marker=shape, mec=GREY, mfc="white", label=str(name))
                for name, shape in shapes.items()]  # fmt: skip
    handles.append(Line2D([], [], color=BLACK, lw=0.9, marker="o", ms=4, label="Pareto front (filled)"))
    return legend_above(ax, handles, ncols=3)
