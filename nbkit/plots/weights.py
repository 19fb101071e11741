"""The weights that edits changed, number by number: maps and distributions."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage

from nbkit.plots.style import GREY, group_styles, integer_axis, legend_above, log_axis

ORIGINAL = {"color": GREY, "ls": "--", "lw": 1.0}


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
