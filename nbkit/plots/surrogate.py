"""Perplexity as a stand-in for task scores: one point a damaged model, coloured by what was done to it."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nbkit.plots.points import CEILING, Edge
from nbkit.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    REFERENCE,
    SKY,
    VERMILION,
    columns,
    group_handles,
    group_styles,
    legend_above,
    log_axis,
)
from nbkit.records.correlation import Correlation, spearman

METRICS = {  # name of the metric, None where the rows have none: label of the axis
    None: "Score",
    "acc": "Accuracy",
    "acc_norm": "Accuracy (length-normalised)",
    "exact_match": "Exact match",
    "f1": "F1",
    "rougeL": "ROUGE-L",
}
DAMAGES = {  # the kinds of `studies.treatment_pool.KINDS`, alike in all panels and figures; others take what is left
    "single edit": (BLUE, "o"),
    "scaled edit": (VERMILION, "D"),
    "RECT or PRUNE": (GREEN, "s"),
    "sequence": (PURPLE, "v"),
    "batch": (SKY, "X"),
    "noise": (ORANGE, "P"),
}
RATIO = "Perplexity ratio"  # to the unedited model's
WHOLE = {"color": BLACK, "lw": 0.8}  # the level of the unedited model: a line, which hides no point


def correlation_text(correlation: Correlation) -> str:
    """For example "ρ = −0.91 [−0.97, −0.80]"."""
    rho, low, high, _ = correlation
    return "ρ undefined" if np.isnan(rho) else f"ρ = {rho:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def ability_vs_perplexity(
    frame: pd.DataFrame,
    ax: Axes,
    collapse_ratio: float | None = None,
    seed: int = 0,
    ceiling: float | None = CEILING,
    worst: bool = False,
) -> Axes:
    """Ability kept against perplexity over the unedited model's (log), with Spearman's rho and its bootstrap interval.

    Args:
        frame: one row a model: ratio, ability (1 for the unedited model, 0 for guessing) and damage, the group.
        collapse_ratio: where a vertical line stands.
        seed: of the bootstrap. ceiling: ratios above it, and infinite or NaN ones, are hollow triangles at the edge.
        worst: whether a line reaches down to the column worst, what is kept of the task that has lost most.
    """
    columns(frame, "ratio", "ability", "damage", *(["worst"] if worst else []))
    handles = _points(frame, ax, "ability", ceiling)
    if worst:
        x, _ = Edge(frame["ratio"], ceiling, along="x").place(frame["ratio"])
        ax.vlines(x, frame["worst"], frame["ability"], color=GREY, lw=0.6, alpha=0.6, zorder=1)
        handles.append(Line2D([], [], color=GREY, lw=0.6, label="down to the task that lost most"))
    handles.append(ax.axhline(1, zorder=1, label="unedited", **WHOLE))
    handles.append(ax.axhline(0, zorder=1, label="guessing", **REFERENCE))
    if collapse_ratio is not None:
        ax.axvline(collapse_ratio, zorder=1, color=GREY, lw=0.8, ls=":")
    ax.set_title(correlation_text(spearman(frame["ratio"], frame["ability"], seed=seed)), fontsize=7, loc="right")
    ax.set(xlabel=RATIO, ylabel="Ability kept (mean over tasks)")
    return legend_above(ax, handles, title_lines=1)


def perplexity_vs_task(
    frame: pd.DataFrame,
    ax: Axes,
    seed: int = 0,
    ceiling: float | None = CEILING,
) -> Axes:
    """One task's score, from 0 to 1, against perplexity over the unedited model's (log), with Spearman's rho.

    Args:
        frame: rows of one task and one model from `studies.treated_scores`, with ratio and damage added: the unedited
            model's row (edited False) is a line and no part of rho; chance is one where answers are chosen (`choice`).
        seed, ceiling: as in `ability_vs_perplexity`.
    """
    columns(frame, "ratio", "task", "score", "damage")
    if frame["task"].nunique() != 1:
        raise ValueError(f"one panel shows one task, the frame has {frame['task'].nunique()}: see perplexity_vs_tasks")
    edited = frame["edited"].to_numpy(bool) if "edited" in frame else np.ones(len(frame), bool)
    models = frame[edited]
    handles = _points(models, ax, "score", ceiling)
    if not edited.all():
        handles.append(ax.axhline(frame["score"][~edited].iloc[0], zorder=1, label="unedited", **WHOLE))
    if "choice" in frame and frame["choice"].iloc[0] and frame["chance"].notna().any():
        handles.append(ax.axhline(frame["chance"].iloc[0], zorder=1, label="guessing", **REFERENCE))
    correlation = spearman(models["ratio"], models["score"], seed=seed)
    heading = str(frame["task"].iloc[0]).replace("_", " ")
    ax.set_title(f"{heading}\n{correlation_text(correlation)}", fontsize=7, loc="right")
    metric = frame["metric"].iloc[0] if "metric" in frame else None
    ax.set(xlabel=RATIO, ylabel=METRICS.get(metric, str(metric)), ylim=(-0.04, 1.04))
    return legend_above(ax, handles, title_lines=2)


def perplexity_vs_tasks(
    frame: pd.DataFrame, axes: Iterable[Axes], seed: int = 0, ceiling: float | None = CEILING
) -> list[Axes]:
    """One `perplexity_vs_task` panel per task, in the rows' order, all with the same axes; spare axes are taken away.

    Each panel has its legend; `shared_legend` puts a single one above the figure. In a grid, the label of the
    perplexities stands under the lowest panel of a column only.
    """
    columns(frame, "task", "damage")
    axes, tasks = list(np.ravel(np.asarray(axes, object))), list(dict.fromkeys(frame["task"]))
    if len(axes) < len(tasks):
        raise ValueError(f"{len(tasks)} tasks need as many axes, not {len(axes)}")
    shown, spare = axes[: len(tasks)], axes[len(tasks) :]
    for ax in spare:
        ax.remove()
    for i, (ax, task) in enumerate(zip(shown, tasks, strict=True)):
        perplexity_vs_task(frame[frame["task"] == task], ax, seed=seed, ceiling=ceiling)
        grid = ax.get_subplotspec()
        if grid is not None and i + grid.get_gridspec().ncols < len(tasks):
            ax.set_xlabel("")
        else:
            ax.tick_params(labelbottom=True)  # where axes are shared, and a spare one was below
    return shown


def rho_by_text(frame: pd.DataFrame, ax: Axes) -> Axes:
    """How closely perplexity of each text goes with ability: Spearman's rho with its interval, one row a text.

    frame: rows of `correlation.compared` with models, the group of models that the row is of: text, rho, low, high, n.
    """
    columns(frame, "text", "models", "rho", "low", "high", "n")
    texts, groups = list(dict.fromkeys(frame["text"])), list(dict.fromkeys(frame["models"]))
    styles, handles = group_styles(groups), []
    for i, group in enumerate(groups):
        rows = frame[frame["models"] == group]
        y = [texts.index(text) + 0.22 * (i - (len(groups) - 1) / 2) for text in rows["text"]]
        colour, marker = styles[group]
        ax.hlines(y, rows["low"], rows["high"], color=colour, lw=1)
        look = {"ls": "none", "marker": marker, "color": colour, "ms": 3.5, "mew": 0}
        handles += ax.plot(rows["rho"], y, label=f"{group} (n = {rows['n'].iloc[0]})", **look)
    ax.axvline(0, zorder=1, **REFERENCE)
    ax.set(xlabel="Spearman's ρ with ability kept", yticks=range(len(texts)), yticklabels=texts, xlim=(-1, None))
    ax.set_ylim(len(texts) - 0.5, -0.5)
    return legend_above(ax, handles, ncols=1)


def _points(frame: pd.DataFrame, ax: Axes, y: str, ceiling: float | None) -> list:
    """The models as points, by kind of damage; the legend's entries."""
    there = set(frame["damage"])
    others = group_styles(name for name in frame["damage"] if name not in DAMAGES)
    styles = {name: style for name, style in (DAMAGES | others).items() if name in there}
    edge = Edge(frame["ratio"], ceiling, along="x")
    for name, style in styles.items():
        rows = frame[frame["damage"] == name]
        edge.points(ax, rows[y].to_numpy(float), rows["ratio"], style, ms=3.2, alpha=0.8, zorder=2)
    handles = group_handles(styles)
    handles += edge.finish(ax)
    log_axis(ax.xaxis)
    return handles
