"""Why an edit breaks the model: the two parts of ROME's update, and where the keys lie with and without prefixes."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MultipleLocator

from nbkit.plots.points import MEDIAN, strips
from nbkit.plots.style import GREY, columns, group_handles, group_styles, integer_axis, legend_above, log_axis

PARTS = {"numerator": "numerator\n$\\|v^* - W k\\|$", "denominator": "denominator\n$|k_u \\cdot u|$"}


def denominators(frame: pd.DataFrame, ax: Axes, group: str = "group") -> Axes:
    """Numerator and denominator of ROME's update (log), a strip of edits per group with its median written beside it.

    Args:
        frame: rows of `studies.single_edits`: numerator, denominator and `group`. Values that are not positive and
            finite have no place on a log axis; the tick label counts them.
    """
    columns(frame, *PARTS, group)
    styles, labels = group_styles(frame[group]), []
    jitter, width = np.random.default_rng(0), 0.8 / len(styles)
    for at, (part, label) in enumerate(PARTS.items()):
        drawn = frame[np.isfinite(frame[part]) & (frame[part] > 0)]
        for strip in strips(at, drawn[part], drawn[group], styles, width, 0.15 * width, jitter):
            colour, marker = strip.style
            ax.plot(strip.places, strip.values, ls="none", marker=marker, color=colour, ms=2.8, mew=0, alpha=0.55)
            median = float(np.median(strip.values))
            strip.median(ax, median, reach=0.22 * width)
            ax.annotate(f"{median:.3g}", (strip.middle + 0.25 * width, median), fontsize=7, va="center")
        left_out = len(frame) - len(drawn)
        labels.append(label + (f"\n({left_out} not drawn: zero or not finite)" if left_out else ""))
    log_axis(ax.yaxis)
    ax.set_ylabel("Norm or absolute value")
    ax.set_xticks(range(len(PARTS)), labels)
    ax.set_xlim(-0.5, len(PARTS) - 0.4)
    handles = [*group_handles(styles, frame[group]), Line2D([], [], label="median", **MEDIAN)]
    legend_above(ax, handles, ncols=3)
    return ax


def similarity_histogram(
    frame: pd.DataFrame, ax: Axes, column: str = "similarity", group: str = "group", bins: int = 40
) -> Axes:
    """The share of keys per cosine similarity (to the prefixed key, say), one histogram per group.

    Args:
        frame: one row a key pair, `column` between -1 and 1, and `group`.
        bins: over the range from -1 (from 0 if nothing is negative) to 1.
    """
    columns(frame, column, group)
    styles = group_styles(frame[group])
    lowest = -1.0 if (frame[column] < -1 / bins).any() else 0.0
    edges = np.linspace(lowest, 1.0, bins + 1)
    drawn = frame.assign(**{column: frame[column].clip(lowest, 1.0)})  # rounding can pass 1
    sns.histplot(drawn, x=column, hue=group, hue_order=list(styles), palette={n: s[0] for n, s in styles.items()},
                 bins=edges, stat="probability", common_norm=False, element="step", alpha=0.3, lw=1, ax=ax,
                 legend=False)  # fmt: skip
    ax.set_xlim(lowest, 1.0)
    ax.xaxis.set_major_locator(MultipleLocator(0.25 if lowest == 0 else 0.5))
    ax.set_xlabel("Cosine similarity of plain and prefixed key")
    ax.set_ylabel("Share of keys")
    legend_above(ax, group_handles(styles, frame[group], alpha=0.3))
    return ax


def norm_histogram(
    frame: pd.DataFrame, ax: Axes, column: str = "norm", group: str = "group", by: str = "prefix", bins: int = 40
) -> Axes:
    """The share of keys per norm (log): filled without prefix, outlined with one, coloured by group.

    Args:
        frame: one row a key: `column` (positive), `group`, and `by` with "plain" or "prefixed".
    """
    columns(frame, column, group, by)
    kinds = list(dict.fromkeys(frame[by]))
    if not set(kinds) <= {"plain", "prefixed"}:
        raise ValueError(f"column {by} holds {', '.join(map(str, kinds))}: only 'plain' and 'prefixed' can be drawn")
    styles, values = group_styles(frame[group]), frame[column].to_numpy(float)
    edges = np.geomspace(values.min() * 0.98, values.max() * 1.02, bins + 1)
    dashes = {"plain": "-", "prefixed": (0, (3, 1))}
    for name, (colour, _) in styles.items():
        for kind in kinds:
            norms = frame.loc[(frame[group] == name) & (frame[by] == kind), column].to_numpy(float)
            if not len(norms):
                continue
            look = {"fc": (colour, 0.35), "lw": 0.6} if kind == "plain" else {"fc": "none", "lw": 1.2}
            share = np.full(len(norms), 1 / len(norms))
            ax.hist(norms, edges, weights=share, histtype="stepfilled", ls=dashes[kind], ec=colour, **look)
    handles = group_handles(styles, alpha=1)
    for kind in kinds:
        filling = (GREY, 0.35) if kind == "plain" else "none"
        label = f"{kind} (n = {(frame[by] == kind).sum()})"
        handles.append(Patch(fc=filling, ec=GREY, ls=dashes[kind], label=label))
    log_axis(ax.xaxis)
    ax.set_xlabel("Norm of the key")
    ax.set_ylabel("Share of keys")
    legend_above(ax, handles)
    return ax


def embedding_scatter(
    frame: pd.DataFrame, ax: Axes, method: str = "t-SNE", group: str = "group", vector: str = "vector"
) -> Axes:
    """Keys in the plane: colour is the group, marker the kind of vector.

    Args:
        frame: rows of `geometry.embed`: x, y, `group` and `vector` (such as "$k_u$").
        method: names the axes ("t-SNE" has no units; for "PCA" give the variances with `ax.set_xlabel`).
    """
    columns(frame, "x", "y", group, vector)
    styles, kinds = group_styles(frame[group]), list(dict.fromkeys(frame[vector]))
    markers = dict(zip(kinds, "o^sDvP*", strict=False))
    if len(markers) < len(kinds):
        raise ValueError(f"at most 7 kinds of vectors can be told apart, the frame has {len(kinds)}")
    for name, (colour, _) in styles.items():
        for kind in kinds:
            points = frame[(frame[group] == name) & (frame[vector] == kind)]
            look = {"marker": markers[kind], "mfc": (colour, 0.35), "mec": colour, "mew": 0.5, "ms": 3.6}
            ax.plot(points["x"], points["y"], ls="none", **look)
    handles = group_handles(styles, alpha=0.5)
    handles += [Line2D([], [], ls="none", marker=markers[k], mfc="none", mec=GREY, label=str(k)) for k in kinds]
    ax.set_xlabel(f"{method} 1")
    ax.set_ylabel(f"{method} 2")
    if method.upper().startswith("T-SNE"):
        ax.set_xticks([])
        ax.set_yticks([])
    legend_above(ax, handles, ncols=3)
    return ax


def similarity_curves(
    frame: pd.DataFrame, ax: Axes, x: str = "position", y: str = "similarity", group: str = "group"
) -> Axes:
    """Median similarity of keys against token position or layer, with the band of the middle half, by group.

    Args:
        frame: one row a key pair: `x` ("position", counted from 0, or "layer"), `y`, and `group`.
    """
    columns(frame, x, y, group)
    handles = []
    for name, (colour, marker) in group_styles(frame[group]).items():
        table = frame[frame[group] == name].groupby(x)[y].quantile([0.25, 0.5, 0.75]).unstack()
        ax.fill_between(table.index, table[0.25], table[0.75], color=colour, alpha=0.2, lw=0)
        handles += ax.plot(table.index, table[0.5], color=colour, marker=marker, ms=3, mew=0, label=str(name))
    handles.append(Patch(color=GREY, alpha=0.3, lw=0, label="middle half"))
    ax.axhline(0, color=GREY, lw=0.5, zorder=0)
    ax.set_ylim(min(-0.05, ax.get_ylim()[0]), 1.05)
    ax.set_xlabel({"position": "Token position (0 is the first)", "layer": "Layer"}.get(x, x))
    ax.set_ylabel("Cosine similarity of keys")
    integer_axis(ax.xaxis)
    legend_above(ax, handles, ncols=3)
    return ax
