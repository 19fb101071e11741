"""Perplexity as a stand-in for task scores: one panel a task, one point an edited model."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nbkit.plots.style import (
    BLUE,
    CEILING,
    GREY,
    ORANGE,
    at_edge,
    columns,
    edge_handle,
    edge_of,
    legend_above,
    log_axis,
    mark_edge,
)
from nbkit.records.correlation import Correlation, spearman


def correlation_text(found: Correlation) -> str:
    """For example "ρ = −0.91 [−0.97, −0.80]"."""
    if np.isnan(found.rho):
        return "ρ undefined"
    return f"ρ = {found.rho:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("-", "−")


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
    edge = edge_of(frame["perplexity"], ceiling)
    x, over = at_edge(frame["perplexity"], edge)
    y = frame["score"].to_numpy(float)
    if "stderr" in frame:
        ax.errorbar(x, y, frame["stderr"].to_numpy(float), ls="none", ecolor=GREY, elinewidth=0.5, alpha=0.6, zorder=1)
    shown = edited & ~over
    ax.plot(x[shown], y[shown], ls="none", marker="o", color=BLUE, ms=3.2, mew=0, alpha=0.85, label="edited model")
    ax.plot(x[~edited], y[~edited], ls="none", marker="*", color=ORANGE, mec="black", mew=0.4, ms=8, label="unedited")
    handles = ax.get_legend_handles_labels()[0]
    if over.any():
        mark_edge(ax, x[over], y[over], BLUE, ">")
        handles.append(edge_handle(int(over.sum()), len(over), edge, ceiling, ">"))
    if "chance" in frame and frame["chance"].notna().any():
        handles.append(ax.axhline(frame["chance"].iloc[0], color=GREY, ls="--", lw=0.8, zorder=1, label="chance"))
    if edited.all():
        handles = [handle for handle in handles if handle.get_label() != "unedited"]
    found = spearman(frame["perplexity"][edited], frame["score"][edited], seed=seed)
    heading = f"{str(frame['task'].iloc[0]).replace('_', ' ')} (n = {found.n})"
    ax.set_title(f"{heading}\n{correlation_text(found)}", fontsize=7, loc="right")
    ax.set_xscale("log")
    if over.any():
        ax.set_xlim(right=edge * 1.15)
    log_axis(ax.xaxis)
    ax.set_xlabel("Perplexity")
    ax.set_ylabel(_score_label(frame))
    legend_above(ax, handles, title_lines=2)
    return ax


def _score_label(frame: pd.DataFrame) -> str:
    metric = frame["metric"].iloc[0] if "metric" in frame else None
    names = {"acc": "Accuracy", "acc_norm": "Accuracy (length-normalised)", "exact_match": "Exact match", "f1": "F1"}
    names |= {"rougeL": "ROUGE-L"}
    return "Score" if metric is None else names.get(metric, str(metric))


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
    for ax, task in zip(axes, tasks, strict=False):
        perplexity_vs_task(frame[frame["task"] == task], ax, seed=seed, ceiling=ceiling)
    for ax in axes[len(tasks) :]:
        ax.remove()
    for i, ax in enumerate(axes[: len(tasks)]):
        grid = ax.get_subplotspec()
        if grid is not None and i + grid.get_gridspec().ncols < len(tasks):
            ax.set_xlabel("")
    return axes[: len(tasks)]
