"""Requests in the order of what keys foretell of them, and how the ones that were edited came out."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import Edge
from nbkit.plots.style import GREY, columns, group_styles, integer_axis, legend_above

NOT_EDITED = "not edited"


def screened_risk(frame: pd.DataFrame, ax: Axes, outcome: str = "outcome", chosen: str = "chosen") -> Axes:
    """The collapse risk (log) of all requests, the highest first; those that were edited are marked by how it ended.

    Args:
        frame: rows of `nbkit.collapse_risk`, with `outcome` ("collapse", "normal", missing where no edit was made) and
            `chosen` ("worst", "random" or missing): a band lies behind the worst. Risks that are
            infinite or NaN are hollow triangles at the top edge.
    """
    columns(frame, "risk", outcome, chosen)
    ranked = frame.assign(shown=frame["risk"].fillna(np.inf)).sort_values("shown", ascending=False, kind="stable")
    places, edge = np.arange(1, len(ranked) + 1), Edge(frame["risk"], ceiling=None)
    edited = ranked[outcome].notna().to_numpy()
    edge.points(ax, places[~edited], ranked["risk"][~edited], (GREY, "."), ms=2.5, alpha=0.5)
    handles = [Line2D([], [], ls="none", marker=".", color=GREY, mew=0, label=f"{NOT_EDITED} (n = {(~edited).sum()})")]
    styles = group_styles(["collapse", "normal"])
    for name in (name for name in styles if (ranked[outcome] == name).any()):
        of_outcome = (ranked[outcome] == name).to_numpy()
        edge.points(ax, places[of_outcome], ranked["risk"][of_outcome], styles[name], ms=4, alpha=0.9, zorder=3)
        label = f"edited: {name} (n = {of_outcome.sum()})"
        handles.append(Line2D([], [], ls="none", marker=styles[name][1], color=styles[name][0], mew=0, label=label))
    worst = int((ranked[chosen] == "worst").sum())
    if worst:
        handles.append(ax.axvspan(0.5, worst + 0.5, color="#ececec", lw=0, zorder=0, label=f"the {worst} worst"))
    handles += edge.finish(ax)
    integer_axis(ax.xaxis, 6)
    ax.set(
        xlim=(0, len(ranked) + 1),
        xlabel="Request, by its risk",
        ylabel="Collapse risk\n(bound on $\\|\\Delta W\\| / \\|W\\|$)",
    )
    return legend_above(ax, handles)
