"""Where each request's key goes when a prefix is put before its prompt."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from nbkit.plots.style import GREY, columns, group_handles, group_styles, legend_above


def key_moves(frame: pd.DataFrame, ax: Axes, group: str = "group") -> Axes:
    """Two vectors of each request in the plane of a PCA, joined by a line: the first hollow, the second filled.

    Args:
        frame: rows of `geometry.embed` by PCA of two kinds of vectors: x, y, vector, request and `group`.
    """
    columns(frame, "x", "y", "vector", "request", group)
    first, second, *others = dict.fromkeys(frame["vector"])
    if others:
        raise ValueError(f"two kinds of vectors are joined, the frame has {2 + len(others)}")
    styles, groups = group_styles(frame[group]), frame.drop_duplicates("request").set_index("request")[group]
    start, end = (frame[frame["vector"] == kind].set_index("request")[["x", "y"]] for kind in (first, second))
    for name, (colour, marker) in styles.items():
        of_group = groups.index[groups == name]
        a, b = start.loc[of_group].to_numpy(), end.loc[of_group].to_numpy()
        ax.add_collection(LineCollection(list(zip(a, b, strict=True)), colors=[colour], lw=0.5, alpha=0.35))
        ax.plot(*a.T, ls="none", marker=marker, mfc="white", mec=colour, mew=0.7, ms=3.4)
        ax.plot(*b.T, ls="none", marker=marker, mfc=colour, mec=colour, mew=0.3, ms=3, alpha=0.8)
    handles = group_handles(styles)
    looks = {first: {"mfc": "white"}, second: {"mfc": GREY}}
    handles += [
        Line2D([], [], ls="none", marker="o", mec=GREY, label=str(kind), **look) for kind, look in looks.items()
    ]
    shares = frame.attrs.get("variance", (float("nan"),) * 2)
    ax.set(xlabel=f"PCA 1 ({shares[0]:.0%} of variance)", ylabel=f"PCA 2 ({shares[1]:.0%})")
    ax.margins(0.06)
    return legend_above(ax, handles, ncols=2)
