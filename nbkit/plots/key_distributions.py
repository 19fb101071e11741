"""Where keys lie: their similarities and norms with and without prefixes, by position and layer, and in the plane."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, MultipleLocator, NullFormatter, PercentFormatter

from nbkit.plots.style import (
    BLACK,
    GREY,
    columns,
    group_handles,
    group_styles,
    integer_axis,
    legend_above,
    log_axis,
    percent_axis,
)
from nbkit.records.intervals import median_interval

VECTORS = {"$k_u$": "o", r"$\bar{k}$": "^", r"$C^{-1}\bar{k}$": "s"}  # the same in every map
MARKERS = "o^sDvP*"


def similarity_histogram(
    frame: pd.DataFrame, ax: Axes, column: str = "similarity", group: str = "group", bins: int = 40
) -> Axes:
    """The share of key pairs per cosine similarity (of plain and prefixed key), one histogram per group.

    Above each stands the median over requests, each with the median of its pairs, and its 95 % interval.

    Args:
        frame: one row a pair of a request's keys: request (its number), `column` between -1 and 1, and `group`.
        bins: over the range from -1 (from 0 if nothing is negative) to 1.
    """
    columns(frame, column, group, "request")
    styles = group_styles(frame[group])
    lowest = -1.0 if (frame[column] < -1 / bins).any() else 0.0
    edges = np.linspace(lowest, 1.0, bins + 1)
    drawn = frame.assign(**{column: frame[column].clip(lowest, 1.0)})  # rounding can pass 1
    palette = {name: colour for name, (colour, _) in styles.items()}
    look = {"hue_order": list(styles), "palette": palette, "element": "step", "alpha": 0.3, "lw": 1, "legend": False}
    sns.histplot(drawn, x=column, hue=group, bins=edges, stat="probability", common_norm=False, ax=ax, **look)
    ax.xaxis.set_major_locator(MultipleLocator(0.25 if lowest == 0 else 0.5))
    top, handles = ax.get_ylim()[1], group_handles(styles, alpha=0.3)
    for number, ((name, (colour, marker)), handle) in enumerate(zip(styles.items(), handles, strict=True)):
        pairs = frame[frame[group] == name]
        of_requests = pairs.groupby("request")[column].median()
        middle, low, high = median_interval(of_requests)
        at = top * (1.05 + 0.07 * number)
        ax.plot([low, high], [at, at], color=colour, lw=1)
        ax.plot(middle, at, ls="none", marker=marker, color=colour, mew=0, ms=4)
        handle.set_label(f"{name} ({len(of_requests)} requests, {len(pairs)} pairs)")
    ax.set(xlim=(lowest, 1.0), ylim=(0, top * (1.05 + 0.07 * len(styles))))
    ax.set(xlabel="Cosine of a subject’s plain and prefixed key", ylabel="Share of pairs")
    percent_axis(ax.yaxis)
    handles.append(Line2D([], [], color=BLACK, marker="o", ms=3, lw=1, label="median over requests, 95 % interval"))
    return legend_above(ax, handles, ncols=1)


def norm_histogram(
    frame: pd.DataFrame, ax: Axes, column: str = "norm", group: str = "group", by: str = "prefix", bins: int = 40
) -> Axes:
    """The share of keys per norm (log): filled without prefix, outlined with one, coloured by group.

    Args:
        frame: one row a key: request (its number), `column` (positive), `group`, and `by` with "plain" or "prefixed".
    """
    columns(frame, column, group, by, "request")
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
    requests = frame.drop_duplicates("request")[group]
    handles = group_handles(styles, alpha=1)
    for name, handle in zip(styles, handles, strict=True):
        handle.set_label(f"{name} ({(requests == name).sum()} requests)")
    for kind in kinds:
        filling = (GREY, 0.35) if kind == "plain" else "none"
        label = f"{kind} ({(frame[by] == kind).sum()} keys)"
        handles.append(Patch(fc=filling, ec=GREY, ls=dashes[kind], label=label))
    log_axis(ax.xaxis)
    low, high = np.log10(ax.get_xlim())
    if high - low < 2:
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high - low < 1 else (1, 3)))
        ax.xaxis.set_minor_locator(LogLocator(subs=range(1, 10)))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="Norm of a subject’s key", ylabel="Share of keys")
    return legend_above(ax, handles)


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
    if len(kinds) > len(MARKERS):
        raise ValueError(f"at most {len(MARKERS)} kinds of vectors can be told apart, the frame has {len(kinds)}")
    markers = {kind: VECTORS[kind] for kind in kinds if kind in VECTORS}
    spare = iter([marker for marker in MARKERS if marker not in markers.values()])
    markers |= {kind: next(spare) for kind in kinds if kind not in markers}
    for name, (colour, _) in styles.items():
        for kind in kinds:
            points = frame[(frame[group] == name) & (frame[vector] == kind)]
            look = {"marker": markers[kind], "mfc": (colour, 0.35), "mec": colour, "mew": 0.5, "ms": 3.6}
            ax.plot(points["x"], points["y"], ls="none", **look)
    handles = group_handles(styles, alpha=0.5)
    handles += [Line2D([], [], ls="none", marker=markers[k], mfc="none", mec=GREY, label=str(k)) for k in kinds]
    ax.set(xlabel=f"{method} 1", ylabel=f"{method} 2")
    if method.upper().startswith("T-SNE"):
        ax.set(xticks=[], yticks=[])
    return legend_above(ax, handles, ncols=3)


def key_among_others(frame: pd.DataFrame, ax: Axes) -> Axes:
    """One request's two keys, joined by a line, in the plane among those of others.

    Args:
        frame: rows of `geometry.embed` by PCA, one of whose requests, the last, is the one in question.
    """
    columns(frame, "x", "y", "group", "vector", "request")
    this = frame["request"] == frame["request"].max()
    embedding_scatter(frame[~this], ax, "PCA")
    ax.plot(frame.loc[this, "x"], frame.loc[this, "y"], color=BLACK, lw=0.8)
    for mark, (_, point) in zip("*P", frame[this].iterrows(), strict=False):
        look = {"marker": mark, "ms": 9, "mfc": "none", "mec": BLACK, "ls": "none"}
        ax.plot(point["x"], point["y"], label=f"this {point['vector']}", **look)
    others = ax.get_legend()
    for handle, text in zip(others.legend_handles, others.get_texts(), strict=True):
        handle.set_label(text.get_text())
    handles = [*others.legend_handles, *ax.get_legend_handles_labels()[0]]
    shares = frame.attrs.get("variance", (float("nan"),) * 2)
    ax.set(xlabel=f"PCA 1 ({shares[0]:.0%} of variance)", ylabel=f"PCA 2 ({shares[1]:.0%})")
    return legend_above(ax, handles, ncols=2)


def similarity_curves(
    frame: pd.DataFrame, ax: Axes, x: str = "position", y: str = "similarity", group: str = "group"
) -> Axes:
    """Median similarity of keys against token position, layer or depth, with the band of the middle half, by group.

    Args:
        frame: one row a key pair: `x` ("position", counted from 0, "layer", or "depth", a layer's from 0 to 1), `y`,
            and `group`.
    """
    columns(frame, x, y, group)
    handles = []
    for name, (colour, marker) in group_styles(frame[group]).items():
        table = frame[frame[group] == name].groupby(x)[y].quantile([0.25, 0.5, 0.75]).unstack()
        ax.fill_between(table.index, table[0.25], table[0.75], color=colour, alpha=0.2, lw=0)
        handles += ax.plot(table.index, table[0.5], color=colour, marker=marker, ms=3, mew=0, label=str(name))
    handles.append(Patch(color=GREY, alpha=0.3, lw=0, label="middle half"))
    ax.axhline(0, color=GREY, lw=0.5, zorder=0)
    names = {"position": "Token position (0 is the first)", "layer": "Layer", "depth": "Depth (0 lowest layer, 1 top)"}
    ax.set(ylim=(min(-0.05, ax.get_ylim()[0]), 1.05), xlabel=names.get(x, x), ylabel="Cosine similarity of keys")
    if x != "depth":
        integer_axis(ax.xaxis)
    return legend_above(ax, handles, ncols=3)
