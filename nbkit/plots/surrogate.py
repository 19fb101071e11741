"""Perplexity as a stand-in for task scores: one panel a task, one point an edited model."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbkit.plots.points import CEILING, Edge
from nbkit.plots.style import BLUE, GREY, ORANGE, REFERENCE, columns, legend_above
from nbkit.records.correlation import Correlation, spearman

METRICS = {  # name of the metric, None where the rows have none: label of the axis
    None: "Score",
    "acc": "Accuracy",
    "acc_norm": "Accuracy (length-normalised)",
    "exact_match": "Exact match",
    "f1": "F1",
    "rougeL": "ROUGE-L",
}


def correlation_text(correlation: Correlation) -> str:
    """For example "ρ = −0.91 [−0.97, −0.80]"."""
    rho, low, high, _ = correlation
    return "ρ undefined" if np.isnan(rho) else f"ρ = {rho:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def perplexity_vs_task(frame: pd.DataFrame, ax: Axes, seed: int = 0, ceiling: float | None = CEILING) -> Axes:
    """One task's score against perplexity (log) with Spearman's rho and its 95 % bootstrap interval.

    Args:
        frame: rows of one task from `studies.task_correlation`: perplexity, task, score, and where there stderr (bars
            of one standard error), chance (dashed line), edited (False for the unedited model: a star, not part of
            rho) and metric (the label).
        seed: of the bootstrap.
        ceiling: perplexities above it, and infinite or NaN ones, are hollow triangles at the right edge.
    """
    columns(frame, "perplexity", "task", "score")
    if frame["task"].nunique() != 1:
        raise ValueError(f"one panel shows one task, the frame has {frame['task'].nunique()}: see perplexity_vs_tasks")
    edited = frame["edited"].to_numpy(bool) if "edited" in frame else np.ones(len(frame), bool)
    unedited = None if edited.all() else frame["perplexity"][~edited].iloc[0]
    edge = Edge(frame["perplexity"], ceiling, along="x", unedited=unedited)
    x, over = edge.place(frame["perplexity"])
    y = frame["score"].to_numpy(float)
    if "stderr" in frame:
        ax.errorbar(x, y, frame["stderr"].to_numpy(float), ls="none", ecolor=GREY, elinewidth=0.5, alpha=0.6, zorder=1)
    dots = {"ls": "none", "marker": "o", "color": BLUE, "ms": 3.2, "mew": 0, "alpha": 0.85}
    handles = ax.plot(x[edited & ~over], y[edited & ~over], label="edited model", **dots)
    if not edited.all():
        star = {"ls": "none", "marker": "*", "color": ORANGE, "mec": "black", "mew": 0.4, "ms": 8}
        handles += ax.plot(x[~edited], y[~edited], label="unedited", **star)
    edge.triangles(ax, y[over], BLUE)
    handles += edge.finish(ax)
    if "chance" in frame and frame["chance"].notna().any():
        handles.append(ax.axhline(frame["chance"].iloc[0], zorder=1, label="chance", **REFERENCE))
    correlation = spearman(frame["perplexity"][edited], frame["score"][edited], seed=seed)
    heading = f"{str(frame['task'].iloc[0]).replace('_', ' ')} (n = {correlation.n})"
    ax.set_title(f"{heading}\n{correlation_text(correlation)}", fontsize=7, loc="right")
    metric = frame["metric"].iloc[0] if "metric" in frame else None
    ax.set(xlabel="Perplexity", ylabel=METRICS.get(metric, str(metric)))
    return legend_above(ax, handles, title_lines=2)


def perplexity_vs_tasks(
    frame: pd.DataFrame, axes: Iterable[Axes], seed: int = 0, ceiling: float | None = CEILING
) -> list[Axes]:
    """One `perplexity_vs_task` panel per task, in the rows' order; axes without a task are taken away.

    Each panel has its legend; `shared_legend` puts a single one above the figure. In a grid, "Perplexity" stands under
    the lowest panel of a column only.
    """
    columns(frame, "task")
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
    return shown
