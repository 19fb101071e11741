"""The weights that edits changed, number by number: maps and distributions."""

from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage

from nbkit.plots.style import GREY, group_styles, integer_axis, legend_above, log_axis

DECADES = 1e5  # how far below the largest number sizes are shown
MAP_DECADES = 1e-3  # of the largest number: where the colours of maps that are drawn together end
ORIGINAL = {"color": GREY, "ls": "--", "lw": 1.0}


CELL = {"max": "largest", "mean": "mean"}  # what a cell of a map shows of the numbers in it, in words


def weight_map(
    change: np.ndarray, ax: Axes, low: float, high: float, cells: int | None = None, by: str = "max"
) -> AxesImage:
    """|ΔW| of one weight as a map, its colours on a log scale from `low` (and less) to `high` (and more).

    Args:
        change: (d_out, d_in).
        cells: so many rows and columns of cells at most, for a weight of more numbers than there are dots to print;
            None: a cell a number.
        by: what a cell shows of the numbers in it: "max", the largest |ΔW|, or "mean", their mean.

    Returns the image, for a colour bar that several maps share.
    """
    if by not in CELL:
        raise ValueError(f"by {by!r} is unknown: choose one of {', '.join(CELL)}")
    size = np.abs(np.asarray(change, float))
    (d_out, d_in), size = size.shape, _binned(size, cells, by)
    edges = (-0.5, d_in - 0.5, d_out - 0.5, -0.5)  # left, right, bottom, top: ticks are places in the weight
    look = {"cmap": "magma", "aspect": "auto", "interpolation": "nearest", "extent": edges}
    image = ax.imshow(np.clip(size, low, high), norm=LogNorm(low, high), **look)
    for axis in (ax.xaxis, ax.yaxis):
        integer_axis(axis, 4)
    ax.set(xlabel="Input (d_mlp)", ylabel="Output (d_model)")
    return image


def weight_maps(
    changes: Mapping[str, np.ndarray], axes: Iterable[Axes], cells: int | None = 100, by: str = "max"
) -> Colorbar:
    """`weight_map` of one weight's changes side by side, {title: ΔW}, in the same colours; the colour bar, which says
    what a cell shows, reaches from the largest cell of all down to `MAP_DECADES` of it."""
    axes = list(axes)
    if len(axes) != len(changes):
        raise ValueError(f"{len(changes)} changes need as many axes, not {len(axes)}")
    high = max(float(_binned(np.abs(np.asarray(change, float)), cells, by).max()) for change in changes.values())
    if not 0 < high < np.inf:
        raise ValueError(f"the largest change of the weight is {high:g}, which is no end of a scale of colours")
    for ax, (title, change) in zip(axes, changes.items(), strict=True):
        image = weight_map(change, ax, high * MAP_DECADES, high, cells, by)
        ax.set_title(title)
        if ax is not axes[0]:
            ax.set_ylabel("")
    what = f"|ΔW|, {CELL[by]} of each cell" if cells else "|ΔW|"
    return axes[0].figure.colorbar(image, ax=axes, label=what)


def _binned(size: np.ndarray, cells: int | None, by: str) -> np.ndarray:
    """At most `cells` rows and columns, which differ by one number at most in how many they hold."""
    for axis, n in enumerate(size.shape):
        if cells is not None and n > cells:
            starts = np.linspace(0, n, cells + 1).astype(int)
            if by == "max":
                size = np.maximum.reduceat(size, starts[:-1], axis)
            else:
                counts = np.diff(starts).reshape([-1, 1] if axis == 0 else [1, -1])
                size = np.add.reduceat(size, starts[:-1], axis) / counts
    return size


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
