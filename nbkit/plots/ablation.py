"""What each setting of a method does, one row a setting: shares with their intervals, by group."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.style import columns, group_handles, group_styles, legend_above, percent_axis

BAND = "#f2f2f2"


def setting_shares(frame: pd.DataFrame, ax: Axes, setting: str = "setting", group: str = "group") -> Axes:
    """Points with their intervals, a row a setting (the first on top), one a group; the dotted lines are the first's.

    Args:
        frame: rows of `records.effects.effects`, of one measure: `setting`, `group`, value, low and high, n.
    """
    columns(frame, setting, group, "value", "low", "high", "n")
    names, styles = list(dict.fromkeys(frame[setting])), group_styles(frame[group])
    for at in range(0, len(names), 2):
        ax.axhspan(at - 0.5, at + 0.5, color=BAND, lw=0, zorder=0)
    for number, (name, (colour, marker)) in enumerate(styles.items()):
        rows = frame[frame[group] == name].set_index(setting).reindex(names)
        at = np.arange(len(names)) + (number - (len(styles) - 1) / 2) * 0.34
        ax.axvline(rows["value"].iloc[0], color=colour, ls=":", lw=0.8, zorder=1)
        ax.hlines(at, rows["low"], rows["high"], color=colour, lw=0.9)
        ax.plot(rows["value"], at, ls="none", marker=marker, color=colour, mew=0, ms=4)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlim=(-0.04, 1.04), ylim=(len(names) - 0.5, -0.5), xticks=[0, 0.5, 1])
    percent_axis(ax.xaxis)
    ax.tick_params(axis="y", length=0)
    handles = group_handles(styles)
    for handle, name in zip(handles, styles, strict=True):
        handle.set_label(f"{name} (n = {frame.loc[frame[group] == name, 'n'].max()})")
    handles.append(Line2D([], [], color="black", ls=":", lw=0.8, label=f"as in {names[0]}"))
    return legend_above(ax, handles)
