"""How the collapse risk of many requests is distributed, and where one of them lies."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import Edge, strips
from nbkit.plots.style import columns, group_styles, legend_above

CHOSEN = {"color": "black", "lw": 1.6}


def risk_distribution(frame: pd.DataFrame, ax: Axes, chosen: float | None = None, group: str = "subject_kind") -> Axes:
    """Collapse risks (log axis) as points, one row of them a group, with one risk marked by a line through all rows.

    Args:
        frame: rows of `nbkit.collapse_risk`: risk, `group`. Risks that are infinite or NaN are hollow triangles at the
            right edge, and the legend says how many.
        chosen: the risk that is marked, one of these or another; None and NaN mark nothing.
    """
    columns(frame, "risk", group)
    marked = [] if chosen is None or np.isnan(chosen) else [float(chosen)]
    groups = frame[group].astype(str)
    styles = group_styles(sorted(set(groups), reverse=True))
    edge = Edge(pd.Series([*frame["risk"], *marked], dtype=float), ceiling=None, along="x")
    edge.values = frame["risk"]  # the marked one has its place on the axis, and is not counted
    rows = list(strips([(frame["risk"], groups)], styles, width=1, spread=0.36))
    for row in rows:
        edge.points(ax, row.places, row.values, row.style, ms=3, alpha=0.5)
    labels = [f"{name}\n(n = {(groups == name).sum()})" for name in styles]
    ax.set_yticks([row.middle for row in rows], labels)
    ax.tick_params(axis="y", length=0)
    handles = []
    for risk in marked:
        ax.axvline(edge.place([risk])[0][0], **CHOSEN)
        handles.append(Line2D([], [], label=f"chosen ({risk:.3g})", **CHOSEN))
    ax.set(
        xlabel="Collapse risk (bound on $\\|\\Delta W\\| / \\|W\\|$)",
        ylim=(rows[0].middle - 0.5, rows[-1].middle + 0.5),
    )
    handles += edge.finish(ax)
    return legend_above(ax, handles) if handles else ax
