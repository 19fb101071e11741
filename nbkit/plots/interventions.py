"""What edits computed with one thing changed are divided by, and what they do: interventions in rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nbkit.plots.points import CEILING, MEDIAN, Edge, strips
from nbkit.plots.style import GREY, REFERENCE, columns, group_handles, group_styles, legend_above, log_axis
from nbkit.records.collapse import ratios

LINEAR = 0.1  # denominators nearer to zero are on a linear scale


def intervention_strips(
    frame: pd.DataFrame,
    axes: Sequence[Axes],
    by: str = "intervention",
    group: str = "group",
    ratio: float = 10.0,
    ceiling: float | None = CEILING,
) -> Sequence[Axes]:
    """Signed denominators on the first of two axes, and how many times perplexity rose on the second; a point an edit.

    One row a name in `by`, the first on top, with a strip and its median for each group. The names stand at the first
    axes; a rule under them parts rows whose `changes` differ.

    Args:
        frame: rows of `studies.intervened_edits` with a column `group`: signed_denominator, perplexity,
            perplexity_before, changes, `by`.
        ratio: from where on an edit counts as a collapse, a dashed line.
        ceiling: rises above it, and infinite or NaN ones, are hollow triangles at the right edge.
    """
    columns(frame, "signed_denominator", "perplexity", "perplexity_before", "changes", by, group)
    styles, rows = group_styles(frame[group]), dict(iter(frame.groupby(by, sort=False)))
    rise, (left, right) = ratios(frame), axes
    edge = Edge(rise, ceiling, along="x")
    look = {"ms": 2.8, "alpha": 0.65}
    width = 0.8 / len(styles)
    place = {"width": width, "spread": 0.28 * width}
    for strip in strips([(of["signed_denominator"], of[group]) for of in rows.values()], styles, **place):
        colour, marker = strip.style
        left.plot(strip.values, strip.places, ls="none", marker=marker, color=colour, mew=0, **look)
        _median(left, strip, np.median(strip.values), width)
    for strip in strips([(rise.loc[of.index], of[group]) for of in rows.values()], styles, **place):
        edge.points(right, strip.places, strip.values, strip.style, **look)
        _median(right, strip, np.median(edge.place(strip.values)[0]), width)
    left.axvline(0, **REFERENCE, zorder=0)
    right.axvline(ratio, **REFERENCE, zorder=0)
    right.axvline(1, color=GREY, lw=0.5, zorder=0)
    handles = [*group_handles(styles), Line2D([], [], label="median", **MEDIAN), *edge.finish(right)]
    handles.insert(len(styles) + 1, Line2D([], [], label=f"denominator 0; rise {ratio:g}-fold", **REFERENCE))
    log_axis(right.xaxis)
    _signed_axis(left, frame["signed_denominator"])
    left.set(xlabel="Denominator $k \\cdot u$, signed")
    right.set(xlabel="Perplexity after the edit, as a multiple of before")
    for ax in axes:
        _rows(ax, rows)
    right.set_yticklabels([])
    return [legend_above(left, handles, ncols=4), right]


def _median(ax: Axes, strip, value: float, width: float) -> None:
    ax.plot([value, value], [strip.middle - 0.4 * width, strip.middle + 0.4 * width], zorder=4, **MEDIAN)


def _signed_axis(ax: Axes, values: pd.Series) -> None:
    """Logarithmic to both sides of a linear middle, with powers of ten for ticks."""
    ax.set_xscale("symlog", linthresh=LINEAR)
    highest = max(abs(values).max(), 10 * LINEAR)
    powers = LINEAR * 10.0 ** np.arange(0, np.floor(np.log10(highest / LINEAR) + 1e-9) + 1)
    below = powers[powers <= max(-values.min(), 0) * 1.01]
    ax.xaxis.set_major_locator(FixedLocator([*-below[::-1], 0, *powers]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    ax.xaxis.set_minor_locator(NullLocator())
    lowest = values.min()
    ax.set_xlim(1.6 * lowest - 0.3 * LINEAR if lowest < 0 else -0.3 * LINEAR, 1.6 * highest)  # no marker is cut


def _rows(ax: Axes, rows: dict[str, pd.DataFrame]) -> None:
    """One row a name, the first on top, told apart by faint bands, and by a line where `changes` is another."""
    for at in range(0, len(rows), 2):
        ax.axhspan(at - 0.5, at + 0.5, color="#f2f2f2", lw=0, zorder=-1)
    kinds = [of["changes"].iloc[0] for of in rows.values()]
    for at in range(1, len(kinds)):
        if kinds[at] != kinds[at - 1]:
            ax.axhline(at - 0.5, color="black", lw=0.6)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(ylim=(len(rows) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
