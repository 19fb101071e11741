"""How long edits take: by how many are computed together, by where the time goes, and as their number grows."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from nbkit.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    columns,
    group_styles,
    legend_above,
    log_axis,
)

PART_COLOURS = [SKY, GREEN, BLUE, ORANGE, PURPLE, VERMILION, GREY]
LABELS = {"edit": "Seconds per edit", "edit and evaluate": "Seconds per edit,\nwith its evaluation"}
QUANTITIES = {  # column: (label, unit)
    "seconds_per_item": ("Seconds per request", 1.0),
    "peak_memory": ("Peak memory (GiB)", 2.0**30),
}


def seconds_per_edit(frame: pd.DataFrame, ax: Axes, what: str = "edit") -> Axes:
    """Seconds per edit against how many are asked for together, both log: a line of medians and a band per model.

    The plain loop is a dashed line, the whole passes a hollow square at 1 edit, both of one edit at a time; how many
    times faster than the plain loop the last point is stands beside it.

    Args:
        frame: rows of `speed.editing`: what, path, model, n, seconds_per_item.
        what: "edit" or "edit and evaluate".
    """
    columns(frame, "what", "path", "model", "n", "seconds_per_item")
    frame = frame[frame["what"] == what]
    if frame.empty:
        raise ValueError(f"the frame has no rows of {what!r} to draw")
    handles = []
    for name, (colour, marker) in group_styles(frame["model"]).items():
        of_model = frame[frame["model"] == name]
        spread = of_model[of_model["path"] == "replay"].groupby("n")["seconds_per_item"].agg(["median", "min", "max"])
        ax.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.2, lw=0)
        handles += ax.plot(spread.index, spread["median"], color=colour, marker=marker, ms=3.5, mew=0, label=str(name))
        medians = of_model.groupby("path")["seconds_per_item"].median()
        if "plain" in medians:
            ax.axhline(medians["plain"], color=colour, ls="--", lw=0.9)
            ratio, last = medians["plain"] / spread["median"].iloc[-1], spread.iloc[-1]
            ax.annotate(f"{ratio:.3g}×", (spread.index[-1], last["median"]), (4, 0), textcoords="offset points",
                        color=colour, va="center", fontsize=7)  # fmt: skip
        if "whole passes" in medians:
            ax.plot([1], [medians["whole passes"]], ls="none", marker="s", mfc="none", mec=colour, ms=4.5)
    handles.append(Line2D([], [], color=GREY, ls="--", lw=0.9, label="plain loop"))
    handles.append(Line2D([], [], ls="none", marker="s", mfc="none", mec=GREY, label="whole passes"))
    sizes = sorted(frame.loc[frame["path"] == "replay", "n"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(n) for n in sizes])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(min(sizes) / 1.4, max(sizes) * 2.2)
    log_axis(ax.yaxis)
    ax.set_xlabel("Edits asked for together")
    ax.set_ylabel(LABELS[what])
    legend_above(ax, handles)
    return ax


def time_shares(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Where an edit's time goes, one stacked bar a path, with its seconds per edit beside its name.

    Args:
        frame: rows of `speed.time_by_operation`: path, n, part, seconds_per_edit, share (0 to 1).
    """
    columns(frame, "path", "n", "part", "seconds_per_edit", "share")
    shares = frame.pivot_table(index=["path", "n"], columns="part", values="share", sort=False, fill_value=0.0)
    if len(shares.columns) > len(PART_COLOURS):
        raise ValueError(f"at most {len(PART_COLOURS)} parts can be told apart, the frame has {len(shares.columns)}")
    starts = shares.cumsum(axis=1) - shares
    for part, colour in zip(shares, PART_COLOURS, strict=False):
        ax.barh(range(len(shares)), shares[part], left=starts[part], height=0.6, color=colour, label=part, lw=0)
    totals = frame.groupby(["path", "n"], sort=False)["seconds_per_edit"].sum()
    names = [f"{path}\n({n} edit{'s' * (n > 1)})\n{total:.2g} s" for (path, n), total in totals.items()]
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlabel("Share of the time of an edit")
    legend_above(ax, ncols=3)
    return ax


def cost_growth(frame: pd.DataFrame, ax: Axes, y: str = "seconds_per_item") -> Axes:
    """What a request costs as their number grows: a dot per batch, and a line for all so far (mean time, most memory).

    Args:
        frame: rows of `speed.growth`: n (requests done), items (of them in the batch), and `y`.
        y: "seconds_per_item" or "peak_memory" (bytes).
    """
    columns(frame, "n", "items", y)
    label, unit = QUANTITIES[y]
    frame = frame.sort_values("n")
    values = frame[y] / unit
    so_far = values.cummax() if y == "peak_memory" else (values * frame["items"]).cumsum() / frame["items"].cumsum()
    dots = ax.plot(frame["n"], values, ls="none", marker="o", color=SKY, ms=2.8, mew=0, label="each batch")
    name = "highest so far" if y == "peak_memory" else "mean so far"
    line = ax.plot(frame["n"], so_far, color=BLACK, lw=1.2, label=name)
    ax.set_ylim(0, float(values.max()) * 1.15)
    ax.set_xlim(0, float(frame["n"].max()) * 1.05)
    ax.set_xlabel("Requests done")
    ax.set_ylabel(label)
    legend_above(ax, [*dots, *line])
    return ax
