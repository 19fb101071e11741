"""Sequences of edits on several models by several methods: a row of panels a model, a column a method.

    fig, axes = plt.subplots(n_models, n_methods, squeeze=False, sharex=True, sharey="row")
    perplexity_grid(frame, axes)

Every frame has the columns model, method, group, seed and n_edits; panels come in the order of their first row. Where a
model was not edited by a method the panel stays away.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, Edge
from nbkit.plots.style import GREY, columns, group_styles, integer_axis, log_axis, percent_axis

STYLES = ("-", "--", ":")
BAND = "median; band: minimum to maximum over orders"


def perplexity_grid(frame: pd.DataFrame, axes: np.ndarray, ceiling: float | None = CEILING) -> list[Line2D]:
    """Perplexity (log axis) against the number of edits: median and range over orders for each group.

    axes: (model, method). ceiling: as in `sequential_curves`, of all panels alike. Returns the entries of a legend.
    """
    frame = _checkpoints(frame, "perplexity")
    edge = Edge(frame["perplexity"], ceiling, unedited=frame.loc[frame["n_edits"] == 0, "perplexity"].max())
    frame, styles = frame.assign(perplexity=edge.place(frame["perplexity"])[0]), group_styles(frame["group"])

    def draw(of_panel: pd.DataFrame, ax: Axes) -> None:
        for name, median in _curves(of_panel, ax, {"perplexity": "-"}).items():
            edge.triangles(ax, median.index[median >= edge.position], styles[name][0])
        edge.finish(ax)

    _panels(frame, axes, {"Perplexity": draw})
    return [*_group_handles(frame), _band_handle(), *edge.handles()]


def share_grid(frame: pd.DataFrame, axes: np.ndarray, shares: Mapping[str, str], label: str) -> list[Line2D]:
    """Shares between 0 and 1 against the number of edits, the first with its range over orders.

    shares: {column: its name in the legend}, three at most. label: of the axis. Returns the entries of a legend.
    """
    frame = _checkpoints(frame, *shares)
    frame = frame[frame["n_edits"] > 0]  # no edit, no success to measure
    styles = dict(zip(shares, STYLES, strict=False))

    def draw(of_panel: pd.DataFrame, ax: Axes) -> None:
        _curves(of_panel, ax, styles)
        ax.set(ylim=(-0.03, 1.03))
        percent_axis(ax.yaxis)

    _panels(frame, axes, {label: draw})
    lines = [Line2D([], [], color=GREY, ls=styles[name], label=said) for name, said in shares.items()]
    return [*_group_handles(frame), *lines, _band_handle()]


def size_grid(frame: pd.DataFrame, axes: np.ndarray, sizes: Mapping[str, str]) -> list[Line2D]:
    """Columns of sizes (log axes) against the number of edits, those above 0; NaN and infinite ones are left out.

    axes: (model × column, method). sizes: {column: name of its axis}. Returns the entries of a legend, which says how
    many are left out.
    """
    frame = _checkpoints(frame, *sizes)
    frame = frame[frame["n_edits"] > 0]
    values = frame[[*sizes]].where(np.isfinite(frame[[*sizes]]) & (frame[[*sizes]] > 0))
    n_left = int(values.isna().sum().sum())
    frame = frame.assign(**{y: values[y] for y in sizes})

    def drawing(y: str) -> Callable[[pd.DataFrame, Axes], None]:
        def draw(of_panel: pd.DataFrame, ax: Axes) -> None:
            _curves(of_panel, ax, {y: "-"})
            log_axis(ax.yaxis)

        return draw

    _panels(frame, axes, {label: drawing(y) for y, label in sizes.items()})
    left = [Line2D([], [], ls="none", label=f"{n_left} of {values.size} not finite or 0")] if n_left else []
    return [*_group_handles(frame), _band_handle(), *left]


def survival_grid(frame: pd.DataFrame, axes: np.ndarray, notes: Mapping[tuple[str, str], str]) -> list[Line2D]:
    """The share of orders that have not collapsed against the number of edits, a step curve for each group.

    frame: rows of `survival.surviving` with the columns model, method and group. notes: by model and method, what is
    written into the panel. Returns the entries of a legend.
    """
    columns(frame, "n_edits", "share", "low", "high", "model", "method", "group")
    styles, last = group_styles(frame["group"]), frame["n_edits"].max()

    def draw(of_panel: pd.DataFrame, ax: Axes) -> None:
        for number, (name, table) in enumerate(of_panel.groupby("group", sort=False)):
            table = table.sort_values("n_edits", kind="stable")
            # As corners, not by `step`: a band whose next value is NaN would else not be drawn up to there.
            at = np.repeat([*table["n_edits"], last], 2)[1:-1]
            share, low, high = (np.repeat(table[column], 2) for column in ("share", "low", "high"))
            ax.plot(at, share, lw=1.4, ls=STYLES[number % len(STYLES)], color=styles[name][0])
            ax.fill_between(at, low, high, color=styles[name][0], alpha=0.2, lw=0)
        note = notes.get(tuple(of_panel[["model", "method"]].iloc[0]), "")
        box = {"fc": "white", "ec": "none", "alpha": 0.7, "pad": 1}
        ax.text(0.03, 0.06, note, ha="left", va="bottom", fontsize=6, bbox=box, transform=ax.transAxes)
        ax.set(ylim=(-0.03, 1.03))
        percent_axis(ax.yaxis)

    _panels(frame, axes, {"Orders not collapsed": draw})
    lines = [
        Line2D([], [], color=colour, ls=STYLES[number % len(STYLES)], label=str(name))
        for number, (name, (colour, _)) in enumerate(styles.items())
    ]
    return [*lines, Line2D([], [], color=GREY, lw=5, alpha=0.3, label="95 % over orders")]


def _checkpoints(frame: pd.DataFrame, *values: str) -> pd.DataFrame:
    columns(frame, "model", "method", "group", "seed", "n_edits", *values)
    return frame[frame["checkpoint"].astype(bool)] if "checkpoint" in frame else frame


def _panels(frame: pd.DataFrame, axes: np.ndarray, parts: Mapping[str, Callable[[pd.DataFrame, Axes], None]]) -> None:
    """Draws each model's rows by each method, in a panel for each part {name of the axis: how it is drawn}; names
    columns at the top and models at the left."""
    models, methods = frame["model"].unique(), frame["method"].unique()
    for column, method in enumerate(methods):
        lowest = None
        for row, (model, label) in enumerate((model, label) for model in models for label in parts):
            ax, of_panel = axes[row, column], frame[(frame["model"] == model) & (frame["method"] == method)]
            if of_panel.empty:
                ax.set_visible(False)
                continue
            parts[label](of_panel, ax)
            integer_axis(ax.xaxis, "auto")
            ax.set(title="" if row else method, ylabel="" if column else f"{model}\n{label}")
            lowest = ax
        lowest.set_xlabel("Edits")
        lowest.tick_params(labelbottom=True)


def _curves(frame: pd.DataFrame, ax: Axes, styles: Mapping[str, str]) -> dict[str, pd.Series]:
    """A line a group and column, the range of the first; the medians of that, by group."""
    medians, first = {}, next(iter(styles))
    for name, (colour, _) in group_styles(frame["group"]).items():
        of_group = frame[frame["group"] == name]
        for y, style in styles.items():
            table = of_group.pivot(index="n_edits", columns="seed", values=y)
            median = table.median(axis=1)
            ax.plot(table.index, median, color=colour, ls=style, lw=1.2)
            if y == first:
                ax.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.2, lw=0)
                medians[name] = median
    return medians


def _group_handles(frame: pd.DataFrame) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=name) for name, (colour, _) in group_styles(frame["group"]).items()]


def _band_handle() -> Line2D:
    return Line2D([], [], color=GREY, lw=5, alpha=0.3, label=BAND)
