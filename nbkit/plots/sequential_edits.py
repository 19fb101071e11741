"""Editing one model again and again: how it fares against the number of edits."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, Edge
from nbkit.plots.style import BLACK, GREY, columns, group_styles, integer_axis, legend_above, percent_axis

LABELS = {
    "perplexity": "Perplexity",
    "efficacy": "Edit success,\nall edits so far",
    "efficacy_after": "Edit success,\nright after each edit",
    "paraphrase": "Paraphrase success,\nall edits so far",
    "neighborhood": "Neighbourhood success,\nall edits so far",
}
BANDS = {"range": ((0.0, 1.0), "minimum to maximum"), "iqr": ((0.25, 0.75), "25th to 75th percentile")}


def sequential_curves(
    frame: pd.DataFrame,
    ax: Axes,
    y: str = "perplexity",
    group: str = "group",
    band: str = "range",
    ceiling: float | None = CEILING,
) -> Axes:
    """The median over seeds of `y` against the number of edits, one line and band per group.

    Args:
        frame: rows of `studies.sequential_edits`: n_edits, seed, `y`, `group`; rows that are no checkpoint are skipped.
        y: "perplexity" (log axis), or a share between 0 and 1 such as "efficacy" (of all edits so far) or
            "efficacy_after" (right after each edit).
        band: "range" (minimum to maximum over the seeds) or "iqr" (25th to 75th percentile); the legend says which.
        ceiling: perplexities above it, and infinite or NaN ones, count as lying there, at the top edge; hollow
            triangles mark where that is true of the median.
    """
    columns(frame, "n_edits", "seed", y, group)
    if band not in BANDS:
        raise ValueError(f"band {band!r} is unknown: choose one of {', '.join(BANDS)}")
    if "checkpoint" in frame:
        frame = frame[frame["checkpoint"].astype(bool)]
    before = frame.loc[frame["n_edits"] == 0, "perplexity"]
    if y != "perplexity":
        frame = frame[frame["n_edits"] > 0]  # no edit, no success to measure
    (low, high), band_text = BANDS[band]
    edge = Edge(frame[y], ceiling, unedited=before.max()) if y == "perplexity" else None
    if edge:
        frame = frame.assign(**{y: edge.place(frame[y])[0]})
    handles = []
    for name, (colour, marker) in group_styles(frame[group]).items():
        of_group = frame[frame[group] == name]
        table = of_group.pivot(index="n_edits", columns="seed", values=y)  # NaN where a seed has no such row
        middle, n_seeds = np.nanmedian(table, axis=1), table.shape[1]
        ax.fill_between(table.index, *np.nanquantile(table, [low, high], axis=1), color=colour, alpha=0.2, lw=0)
        look = {"color": colour, "marker": marker if len(table) <= 12 else None, "ms": 3, "mew": 0}
        handles += ax.plot(table.index, middle, label=f"{name} ({n_seeds} seed{'s' * (n_seeds > 1)})", **look)
        if edge:
            edge.triangles(ax, table.index[middle >= edge.position], colour)
    handles.append(Line2D([], [], color=GREY, lw=5, alpha=0.3, label=f"median; band: {band_text}"))
    if edge:
        handles += edge.finish(ax)
    else:
        ax.set(ylim=(-0.03, 1.03))
    ax.set(xlabel="Number of edits", ylabel=LABELS.get(y, y))
    integer_axis(ax.xaxis)
    return legend_above(ax, handles)


def survival_curves(frame: pd.DataFrame, ax: Axes, group: str = "group", n_edits: int | None = None) -> Axes:
    """The share of sequences that have not collapsed against the number of edits, a step curve for each group.

    Args:
        frame: rows of `survival.surviving` for each group: n_edits, share, low, high, `group`. The band from low to
            high is left out where it is NaN. Curves of the same course are drawn one beside the other.
        n_edits: where the axis ends; None: at the last of the frame.
    """
    columns(frame, "n_edits", "share", "low", "high", group)
    styles, last = group_styles(frame[group]), frame["n_edits"].max() if n_edits is None else n_edits
    for number, (name, (colour, _)) in enumerate(styles.items()):
        table = frame[frame[group] == name].sort_values("n_edits", kind="stable")
        at, share = [*table["n_edits"], last], [*table["share"], table["share"].iloc[-1]]
        look = {"color": colour, "label": str(name), "ls": ["-", "--", ":"][number % 3]}
        ax.step(at, share, where="post", lw=1.6, **look)
        band = [[*table[edge], table[edge].iloc[-1]] for edge in ("low", "high")]
        ax.fill_between(at, *band, step="post", color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="Number of edits", ylabel="Orders not\nyet collapsed", ylim=(-0.03, 1.03))
    percent_axis(ax.yaxis)
    integer_axis(ax.xaxis)
    return legend_above(ax)


def sequence_step(frame: pd.DataFrame, ax: Axes, seed: int, step: int, ceiling: float | None = CEILING) -> Axes:
    """Perplexity (log axis) over one sequence with one of its steps marked, before the band of all orders.

    Args:
        frame: rows of one study of sequences, all orders: n_edits, seed, perplexity, checkpoint.
        seed: the order that is drawn as a line.
        step: the number of edits that is marked; where perplexity was not measured there, by a line only.
        ceiling: as in `sequential_curves`.
    """
    columns(frame, "n_edits", "seed", "perplexity", "checkpoint")
    name = "all orders"
    sequential_curves(frame.assign(group=name), ax, ceiling=ceiling)
    handles = list(ax.get_legend().legend_handles)
    measured = frame[frame["checkpoint"].astype(bool)]
    edge = Edge(measured["perplexity"], ceiling, unedited=measured.loc[measured["n_edits"] == 0, "perplexity"].max())
    own = measured[measured["seed"] == seed].sort_values("n_edits")
    places, _ = edge.place(own["perplexity"])
    look = {"color": BLACK, "lw": 1.2, "zorder": 3}
    handles += ax.plot(own["n_edits"], places, label=f"order {seed}", **look)
    ax.axvline(step, color=GREY, lw=0.8, ls=":")
    here = (own["n_edits"] == step).to_numpy()
    ax.plot(own["n_edits"][here], places[here], ls="none", marker="o", ms=6, mfc="white", mec=BLACK, mew=1.4, zorder=4)
    handles.append(Line2D([], [], color=GREY, lw=0.8, ls=":", marker="o", mfc="white", mec=BLACK, label=f"step {step}"))
    return legend_above(ax, handles)
