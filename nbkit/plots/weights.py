"""The weights that edits changed, number by number: maps and distributions."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage

from nbkit.plots.style import GREY, group_styles, integer_axis, legend_above, log_axis

DECADES = 1e5  # how far below the largest number sizes are shown
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


def weights_above(changes: Mapping[str, np.ndarray], ax: Axes, original: np.ndarray | None = None) -> Axes:
    """How large the numbers of each change of a weight are: the share of them above a size (both log), a line a change.

    Args:
        changes: {name: ΔW}.
        original: the weight itself, a dashed line.
    """
    drawn = dict(changes) | ({} if original is None else {"the weights themselves": original})
    sizes = {name: np.sort(np.abs(np.asarray(change, float)).ravel()) for name, change in drawn.items()}
    largest = max(size[-1] for size in sizes.values())
    if not largest > 0:
        raise ValueError("no change of a weight is above zero, so there is no size to draw")
    places, styles = np.geomspace(largest / DECADES, largest, 400), group_styles(changes)
    for name, size in sizes.items():
        look = {"color": styles[name][0], "lw": 1.3} if name in styles else ORIGINAL
        share = 1 - np.searchsorted(size, places, side="right") / len(size)
        ax.plot(places[share > 0], share[share > 0], label=f"{name} (largest {size[-1]:.2g})", **look)
    for axis in (ax.xaxis, ax.yaxis):
        log_axis(axis)
    ax.set(xlabel="|ΔW|, number by number", ylabel="Share of the numbers above")
    return legend_above(ax)
